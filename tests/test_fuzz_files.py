"""Files that are nearly Matrix Market: the reader gives what the reference in market.py gives, or both refuse.

Readers that guess turn a slip of the pen into a wrong matrix without a word. `pytest --fuzz-examples 100000` searches
for longer.
"""

import pytest
from fuzzing import fuzz
from hypothesis import event, given
from hypothesis import strategies as st
from market import FIELDS, FORMATS, SYMMETRIES, parse

from functional_lstsq.cli.errors import BadInput
from functional_lstsq.cli.formats import read

BYTES = [bytes([c]) for c in b"\0\t\n\r\v\f\x1c\x85\xa0\xb2\xff ,;%+-._/:0123456789eEdDjxnN"]
TOKENS = b"""nan inf -Infinity 1e999 -1D+999 1e-400 4.9e-324 1.7976931348623159e308 0x10 1_0 1,5 1.5abc 5e2 1.733+02 1e
    1e+ . +.5 -.5D-1 5. --1 +-1 1j 0 -0 00 01 +1 -1 1.0 5 '1' (1,2) % 9007199254740992 9007199254740993
    9223372036854775808 18446744073709551617""".split()
TOKENS += [b"", b"% 1", b"+ 1", b"9" * 30, b"1" * 400]
HEADER = [*(word.encode() for word in (*FORMATS, *FIELDS, *SYMMETRIES)), b"vector", b"matrix", b"%%MatrixMarket", b"%"]


def numbers(field):
    """A number as files spell it, which is what the field allows."""
    sign, digits = st.sampled_from(["", "+", "-"]), st.text("0123456789", min_size=1, max_size=20)
    integer = st.builds("".join, st.tuples(sign, digits))
    if "integer" in field:
        return integer
    mantissa = st.one_of(
        digits, st.builds("{}.{}".format, digits, st.just("") | digits), st.builds(".{}".format, digits)
    )
    power = st.builds("{}{}{}".format, st.sampled_from("eEdD"), sign, st.integers(0, 30).map(str) | st.just("007"))
    real = st.builds("".join, st.tuples(sign, mantissa, st.just("") | power))
    return st.one_of(integer, real, st.floats(allow_nan=False, allow_infinity=False).map(repr))


@st.composite
def files(draw):
    """A file as it should be, in one of the ways that there are to write it."""
    format, field, symmetry = (draw(st.sampled_from(words)) for words in (FORMATS, FIELDS, SYMMETRIES))
    if field == "pattern":
        format, symmetry = "coordinate", "symmetric" if symmetry != "general" else symmetry
    if symmetry == "hermitian":
        field = "complex"
    m = draw(st.integers(0, 4))
    n = m if symmetry != "general" else draw(st.integers(0, 4))
    low = {"general": -n, "skew-symmetric": 1}.get(symmetry, 0)
    places = [(i, j) for j in range(n) for i in range(m) if i - j >= low]
    if format == "coordinate":
        places = draw(st.lists(st.sampled_from(places), max_size=6)) if places else []  # some of them twice
    gap, number = st.sampled_from([" ", " ", " ", "\t", "  ", " \t"]), numbers(field)
    banner = draw(st.sampled_from(["{}", "{}", "\ufeff{}"])).format(
        f"%%MatrixMarket matrix {format} {field} {symmetry}"
    )
    lines = [banner if draw(st.booleans()) else banner.upper()]
    lines += draw(st.lists(st.sampled_from(["%", "% 3 3 1", "%%MatrixMarket", "", " ", "%\t\0\xe9"]), max_size=2))
    lines.append(draw(gap).join(map(str, [m, n, *([len(places)] if format == "coordinate" else [])])))
    for i, j in places:
        words = [str(i + 1), str(j + 1)] if format == "coordinate" else []
        words += [draw(number) for _ in range({"pattern": 0, "complex": 2}.get(field, 1))]
        if symmetry == "hermitian" and i == j:
            words[-1] = draw(st.sampled_from(["0", "-0.0", "0D0", ".0"]))
        line = draw(gap).join(words)
        lines.append(draw(st.sampled_from(["{}", "{}", "{}", " {}", "{} ", "{}\t", "\n{}", " \r\n{}"])).format(line))
    ends = [draw(st.sampled_from(["\n", "\n", "\r\n"])) for _ in lines[1:]]
    ends.append(draw(st.sampled_from(["\n", "\n", "\r\n", "", "\r", " ", "\n\n"])))
    return "".join(line + end for line, end in zip(lines, ends, strict=True)).encode()


@st.composite
def mutated(draw):
    """Such a file after up to four slips."""
    text = draw(files())
    for _ in range(draw(st.integers(0, 4))):
        text = draw(st.sampled_from([of_bytes, of_lines, of_words]))(draw, text)
    return text


def of_bytes(draw, text):
    """Bytes that are lost, added, changed, doubled, or all those from some place on."""
    start = draw(st.integers(0, len(text)))
    end = min(len(text), start + draw(st.sampled_from([0, 1, 1, 1, 2, 5, 10**6])))
    other = draw(st.sampled_from(BYTES) | st.sampled_from(TOKENS) | st.binary(max_size=3))
    new = draw(st.sampled_from([b"", other, other, text[start:end] * 2]))
    return text[:start] + new + text[end:]


def of_lines(draw, text):
    """Lines that change places, come twice, or are gone."""
    lines = text.split(b"\n")
    i, j = (draw(st.integers(0, len(lines) - 1)) for _ in range(2))
    what = draw(st.sampled_from(["swap", "double", "drop", "join", "move"]))
    if what == "swap":
        lines[i], lines[j] = lines[j], lines[i]
    elif what == "join":
        lines[i : i + 2] = [b" ".join(lines[i : i + 2])]
    else:
        line = lines[i] if what == "double" else lines.pop(i)
        lines[j:j] = [line] if what != "drop" else []
    return b"\n".join(lines)


def of_words(draw, text):
    """A word that is another, in the header or below it."""
    lines = text.split(b"\n")
    i = draw(st.integers(0, len(lines) - 1))
    words = lines[i].split(b" ")
    k = draw(st.integers(0, len(words) - 1))
    words[k : k + draw(st.integers(0, 1))] = [draw(st.sampled_from(TOKENS) | (st.sampled_from(HEADER)))]
    lines[i] = b" ".join(words)
    return b"\n".join(lines)


def added_up(found):
    """{(i, j): value} of what was read, in the order of the file."""
    entries = {}
    for i, j, value in zip(found.rows.tolist(), found.columns.tolist(), found.values.tolist(), strict=True):
        entries[i, j] = entries.get((i, j), 0) + value
    return entries


def same(text, path):
    """Whether the file was taken; an AssertionError where the reader and the reference differ."""
    path.write_bytes(text)
    try:
        want = parse(text)
    except ValueError:
        with pytest.raises(BadInput, match=r"\A.+\Z"):  # one line
            read(str(path))
        return False
    found = read(str(path))
    got = added_up(found)
    assert found.shape == want[0]
    assert got.keys() == want[1].keys()
    # Added up in the order of the file, so to the last digit; what is beyond the range of doubles may be no number.
    assert all(got[at] == value or (got[at] != got[at] and value != value) for at, value in want[1].items())
    return True


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "A.mtx"


@fuzz(200)
@given(text=mutated())
def test_a_file_is_read_as_the_format_says_or_refused(path, text):
    event("taken" if same(text, path) else "refused")


@fuzz(100)
@given(text=files())
def test_a_file_as_it_should_be_is_taken(path, text):
    assert same(text, path)

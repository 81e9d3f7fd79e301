import re

from hypothesis import given
from hypothesis import strategies as st

from ckptengine.archive.names import escape

keys = st.one_of(
    st.integers(),
    st.text(st.characters(codec="utf-8"), max_size=12),
    st.sampled_from(["__a", "..", ".", "%", "#3", "", "a/b", "c\\d", "%2F"]),
)


def unescape(name):
    """Return the key of a node name, as docs/format.md describes it."""
    if name == "%":
        return ""
    if name.startswith("#"):
        return int(name[1:])
    return re.sub(r"%([0-9A-F]{2})", lambda match: chr(int(match[1], 16)), name)


@given(keys)
def test_every_key_comes_back_from_its_node_name(key):
    assert unescape(escape(key)) == key
    assert type(unescape(escape(key))) is type(key)


@given(keys)
def test_node_names_are_legal_in_zarr_and_in_a_file_system(key):
    name = escape(key)
    assert name
    assert set(name) != {"."}
    assert not name.startswith("__")
    assert "/" not in name
    assert "\\" not in name
    assert "\0" not in name


@given(st.lists(keys, min_size=2, max_size=20))
def test_distinct_keys_have_distinct_node_names(several):
    distinct = {(type(key), key) for key in several}
    assert len({escape(key) for _, key in distinct}) == len(distinct)

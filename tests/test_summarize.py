"""Descriptions and synopses: what is read, which pairs are one family, what is held out, and the baselines."""

import pytest

from experiments.summarize import prepare
from experiments.summarize.prepare import Package, apart, families, lead, one_of_each, paragraphs, read, split
from moejax.config import UserError

LONG = " ".join(f"word{chr(97 + n)}" for n in range(25))


def package(name, source=None, synopsis="does some thing", description=LONG):
    return Package(name, source or name, synopsis, description)


def test_reads_fields_that_go_on():
    packages = "Package: a\nSource: src (1.2)\nDescription: x\n\nPackage: b\n"
    descriptions = ("Package: b\nDescription-en: two  words\n First\n line.\n .\n Second.\n\n\n"
                    "Package: a\nDescription-en: x\n")
    assert list(paragraphs("A: 1\n 2\nB: c: d\n\nA: 3")) == [{"A": "1\n 2", "B": "c: d"}, {"A": "3"}]
    assert read(packages, descriptions) == [
        Package("a", "src", "x", ""), Package("b", "b", "two words", "First line. Second.")]


def test_one_package_stands_for_a_source():
    found = one_of_each([package("x-doc", "x"), package("x", "x"), package("y-tools", "y"), package("y-ui", "y"),
                         package("z", description="too short"), package("w", synopsis="one")])
    assert [one.name for one in found] == ["x", "y-ui"]


def test_families_share_a_synopsis_or_a_beginning():
    def other(n):
        return " ".join(f"{chr(97 + n)}{word}" for word in LONG.split())
    found = families([package("llvm-14", synopsis="compiler 14", description=other(0)),
                      package("llvm-15", synopsis="Compiler, 15", description=other(1)),
                      package("clang", synopsis="another one", description=other(1) + " and more"),
                      package("vim", synopsis="editor", description=other(2))])
    assert found == ["clang", "clang", "clang", "vim"]


def test_no_family_is_on_both_sides():
    packages = [package(f"p{chr(97 + n % 26)}{n}", synopsis=f"family {chr(97 + n // 26)}{chr(97 + n % 26)}",
                        description=f"{chr(97 + n // 26)}{chr(97 + n % 26)} {LONG}") for n in range(400)]
    packages += [package(f"q{n}", synopsis=packages[n].synopsis, description=f"q{chr(97 + n % 26) * (n + 1)} {LONG}")
                 for n in range(400)]
    packages += [package(f"r{n}", synopsis="all alike", description="r" * n + LONG) for n in range(prepare.LARGEST + 1)]
    train, test = split(packages, families(packages))
    assert sorted(train + test) == sorted(packages) and 30 < len(test) < 150
    assert not {one.synopsis for one in train} & {one.synopsis for one in test}
    assert all(one.synopsis != "all alike" for one in test)
    assert split(packages[::-1], families(packages[::-1]))[1] == test


def test_near_copies_are_left_out_and_the_others_keep_what_is_most_like_them():
    train = [package("a", description="edits text of all kinds quickly"),
             package("b", description="lets you play chess against others"),
             package("c", description="converts pictures between formats")]
    test = [package("copy", description=train[0].description), package("go", description="you can play go"),
            package("again", description=train[2].description.upper()), package("svg", description="pictures as vectors"),
            package("ed", description="quickly changes text")]
    assert apart(train, test) == [(test[1], train[1]), (test[3], train[2]), (test[4], train[0])]


def test_the_lead_is_the_first_words():
    assert lead("one two three", 2) == "one two"


def test_without_apt_get_there_is_one_line(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="no apt-get here; prepare the data on a Debian or Ubuntu machine"):
        prepare.fetch()


@pytest.mark.parametrize("status", (0, 100))
def test_all_lists_or_one_line(status, tmp_path, monkeypatch):
    apt = tmp_path / "apt-get"
    apt.write_text(f"""#!/bin/sh
for last; do case "$last" in Dir::State::lists=*) lists=${{last#*=}};; esac; done
echo "Package: a" > "$lists/x_Packages"
echo "Package: a" > "$lists/x_Translation-en"
echo "E: one of two failed" >&2
exit {status}
""")
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    if status == 0:
        assert prepare.fetch() == ("Package: a\n", "Package: a\n")
    else:
        with pytest.raises(UserError, match=r"could not fetch all lists \(E: one of two failed\); check the network"):
            prepare.fetch()

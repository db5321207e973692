"""Tables out of spreadsheets: what does not matter changes nothing, and faults are named."""

import pytest

from data_pipelines.building.builders import open_builder
from data_pipelines.config import DataConfig
from data_pipelines.faults import DataError
from data_pipelines.reading.tables import read_table
from tests.data_pipelines.fabricate import raw_case, write_folder

ROWS = [{"case": "a", "patient": "p1", "note": ""}, {"case": "b", "patient": "p, 2", "note": "x"}]


@pytest.mark.parametrize(
    "text",
    [
        'case,patient,note\na,p1,\nb,"p, 2",x\n',
        '\ufeffcase,patient,note\r\na,p1,\r\nb,"p, 2",x\r\n',
        "case;patient;note\na;p1;\nb;p, 2;x\n",
        "case\tpatient\tnote\na\tp1\nb\tp, 2\tx",
        'case , patient, note\n a,p1 ,\n\n,,\nb, "p, 2" ,x\xa0\n',
        'case,patient,note,,\na,p1,,,\nb,"p, 2",x,,,\n',
    ],
    ids=["plain", "Excel", "semicolons", "tabs, short row", "blanks", "empty columns"],
)
def test_what_a_spreadsheet_adds_changes_nothing(tmp_path, text):
    path = tmp_path / "table.csv"
    path.write_bytes(text.encode())
    assert read_table(path, ("case", "patient"), remedy="Mend it.") == ROWS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("case,patient\na,Jürgen\n".encode("cp1252"), r"text in UTF-8; got the byte 0xfc, .* Save"),
        ("case,patient\na,p\n".encode("utf-16"), r"text in UTF-8; got the byte 0xff"),
        (b'case,patient\na,"' + b"p" * 200_000, r"a table in CSV; got: field larger than .* Save"),
        (b"", r"columns case and patient; got no rows. Mend it"),
        (b"case,patient\n", r"columns case and patient; got no row below the header. Mend it"),
        (b"name,patient\na,p,q\n", r"columns case and patient; got name, patient. Mend it"),
        (b"case,patient,case\na,p,b\n", r"each column once; got case again. Rename one"),
        (b"case,patient\na,p\nb,q,r\n", r"cells .* got 3 and 2 in the row of b. Put .* ',' into"),
        (b"case,patient\n,p,q\n", r"got 3 and 2 in the row of an empty cell"),
    ],
)
def test_faulty_tables_are_refused(tmp_path, content, message):
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_table(path, ("case", "patient"), remedy="Mend it.")
    assert str(path) in str(caught.value)


def test_a_table_that_cannot_be_read_is_a_fault_of_the_data(tmp_path):
    with pytest.raises(DataError, match=r"must be a readable file; got: Is a directory. Copy"):
        read_table(tmp_path, ("case",), remedy="Mend it.")


def test_both_readers_of_tables_refuse_another_encoding(tmp_path):
    config = write_folder(tmp_path / "folder", raw_case("a"))
    (config.path / "patients.csv").write_bytes("case,patient\na,Jürgen\n".encode("cp1252"))
    with pytest.raises(DataError, match="text in UTF-8"):
        open_builder(config)
    root = tmp_path / "picai"
    sheet = root / "labels/clinical_information/marksheet.csv"
    sheet.parent.mkdir(parents=True)
    sheet.write_bytes("patient_id,study_id,center\n1,100,Zürich\n".encode("cp1252"))
    (root / "images/1").mkdir(parents=True)
    (root / "images/1/1_100_t2w.mha").touch()
    with pytest.raises(DataError, match="text in UTF-8"):
        open_builder(DataConfig(name="picai", path=root, cache=tmp_path / "cache"))

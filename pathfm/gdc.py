"""Slides of the Genomic Data Commons: its manifests, TCGA barcodes, and which institution a source-site code means."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from pathfm.errors import InputError

# The studies of TCGA as GDC's tables spell them.
STUDIES = {
    "Adrenocortical carcinoma": "ACC",
    "Bladder Urothelial Carcinoma": "BLCA",
    "Breast invasive carcinoma": "BRCA",
    "Cervical squamous cell carcinoma and endocervical adenocarcinoma": "CESC",
    "Cholangiocarcinoma": "CHOL",
    "Colon adenocarcinoma": "COAD",
    "Lymphoid Neoplasm Diffuse Large B-cell Lymphoma": "DLBC",
    "Esophageal carcinoma": "ESCA",
    "Glioblastoma multiforme": "GBM",
    "Head and Neck squamous cell carcinoma": "HNSC",
    "Kidney Chromophobe": "KICH",
    "Kidney renal clear cell carcinoma": "KIRC",
    "Kidney renal papillary cell carcinoma": "KIRP",
    "Acute Myeloid Leukemia": "LAML",
    "Brain Lower Grade Glioma": "LGG",
    "Liver hepatocellular carcinoma": "LIHC",
    "Lung adenocarcinoma": "LUAD",
    "Lung squamous cell carcinoma": "LUSC",
    "Mesothelioma": "MESO",
    "Ovarian serous cystadenocarcinoma": "OV",
    "Pancreatic adenocarcinoma": "PAAD",
    "Pheochromocytoma and Paraganglioma": "PCPG",
    "Prostate adenocarcinoma": "PRAD",
    "Rectum adenocarcinoma": "READ",
    "Sarcoma": "SARC",
    "Skin Cutaneous Melanoma": "SKCM",
    "Stomach adenocarcinoma": "STAD",
    "Testicular Germ Cell Tumors": "TGCT",
    "Thyroid carcinoma": "THCA",
    "Thymoma": "THYM",
    "Uterine Corpus Endometrial Carcinoma": "UCEC",
    "Uterine Carcinosarcoma": "UCS",
    "Uveal Melanoma": "UVM",
}
SITES = Path(__file__).with_name("source_sites.csv")  # see `source_sites`
GDCS = {"TSS Code": "code", "Source Site": "centre", "Study Name": "project"}  # GDC's columns -> ours
MANIFEST = ("id", "filename", "md5", "size", "state")
SHEET = ("File ID", "File Name", "Project ID")
BARCODE = re.compile(r"(TCGA-([A-Z0-9]{2})-[A-Z0-9]{4})-(\d{2})[A-Z]-\d{2}-((DX|TS|MS|BS)[A-Z0-9]*)(?![A-Z0-9-])")
SECTIONS = {"DX": "FFPE", "TS": "frozen", "MS": "frozen", "BS": "frozen"}  # diagnostic; top, middle, bottom
UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


class Barcode(NamedTuple):
    """What the barcode of a TCGA slide says, such as TCGA-A7-A0CE-01Z-00-DX1."""

    slide: str
    patient: str  # TCGA-A7-A0CE
    site: str  # A7, a key of `source_sites`: an institution and a cancer type
    section: str  # "FFPE" (DX) or "frozen" (TS, MS, BS)
    sample: str  # "tumour" (01 to 09, 40), "normal" (10 to 19), "control" (20 to 29) or "other"


def barcode(name: str) -> Barcode:
    """The barcode that a file's name begins with. Raises InputError where it begins with none."""
    found = BARCODE.match(Path(name).name)
    if not found:
        raise InputError(
            f"'{name}' begins with no barcode of a TCGA slide, such as TCGA-A7-A0CE-01Z-00-DX1; "
            "leave it out, or write a cohort.csv"
        )
    kind = int(found[3])
    tumour, normal, control = 1 <= kind <= 9 or kind == 40, 10 <= kind <= 19, 20 <= kind <= 29
    sample = "tumour" if tumour else "normal" if normal else "control" if control else "other"
    return Barcode(found[0], found[1], found[2], SECTIONS[found[5]], sample)


def source_sites(path: str | Path = SITES) -> pd.DataFrame:
    """By source-site code: project ("TCGA-BRCA") and centre.

    path   a table of text, by tabs, or by commas in a .csv: the columns code, project, centre, or those of GDC's page
           "Tissue Source Site Codes" (TSS Code, Source Site, Study Name) as it is saved from there. The table that
           comes with pathfm has GDC's 830 codes; where GDC spells an institution in several ways (UNC, University of
           North Carolina), `centre` is one of them, which is ours, and `gdc_name` is as GDC has it

    A code is a site and a study: one institution has a code for each cancer type. Institutions are told apart by their
    names without case and blanks.
    """
    sites = _read(Path(path))
    named = {name.casefold(): ours for name, ours in GDCS.items()}
    sites = sites.rename(columns=lambda name: named.get(name.strip().casefold(), name.strip()))
    lacking = [column for column in GDCS.values() if column not in sites]
    if lacking:
        raise InputError(f"{path} has no column {', '.join(lacking)}. Found: {', '.join(sites.columns)}")
    twice = sites["code"][sites["code"].duplicated()]
    if len(twice):
        raise InputError(f"{path} has code '{twice.iloc[0]}' more than once; keep one")
    study = {name.casefold(): f"TCGA-{short}" for name, short in STUDIES.items()}
    sites["project"] = [study.get(name.strip().casefold(), name.strip()) for name in sites["project"]]
    sites["centre"] = sites["centre"].str.split().str.join(" ")
    first = sites.groupby(sites["centre"].str.casefold())["centre"].transform("first")
    return sites.assign(centre=first).set_index("code")[["project", "centre"]]


def files(path: str | Path) -> pd.DataFrame:
    """Files of a GDC manifest or sample sheet: id, name, md5, size (bytes), project; None where it does not say.

    Raises InputError for missing columns (named), an empty table, and a file that is listed twice.
    """
    path = Path(path)
    table = _read(path)
    if set(SHEET) <= set(table):
        table = table[list(SHEET)].set_axis(["id", "name", "project"], axis=1).assign(md5=None, size=None)
    elif set(MANIFEST[:4]) <= set(table):
        table = table[list(MANIFEST[:4])].set_axis(["id", "name", "md5", "size"], axis=1).assign(project=None)
        sizes = pd.to_numeric(table["size"], errors="coerce")
        if not (sizes >= 0).all():
            row = int((~(sizes >= 0)).to_numpy().argmax())
            raise InputError(f"{path}: row {row + 1} has size '{table['size'][row]}', which is no number of bytes")
        table["size"] = sizes.astype("int64")
    else:
        kind, needed = ("sample sheet", SHEET) if any(c in table for c in SHEET) else ("manifest", MANIFEST[:4])
        lacking = [column for column in needed if column not in table]
        raise InputError(
            f"{path} is no GDC {kind}: it lacks {', '.join(lacking)}. "
            f"A manifest has {', '.join(MANIFEST)}; a sample sheet {', '.join(SHEET)} and more"
        )
    for row, (uuid, name) in enumerate(zip(table["id"], table["name"], strict=True), 1):
        if not UUID.fullmatch(str(uuid)) or not str(name) or Path(str(name)).name != name or name in (".", ".."):
            raise InputError(f"{path}: row {row} has id '{uuid}' and file '{name}'; download the table from GDC again")
    for column in ("id", "name"):
        twice = table[column][table[column].duplicated()]
        if len(twice):
            raise InputError(f"{path} lists {twice.iloc[0]} {(table[column] == twice.iloc[0]).sum()} times; keep one")
    return table.reset_index(drop=True)


def table(path: str | Path, folder: str | Path | None = None, sites: str | Path | None = None) -> pd.DataFrame:
    """The table of a cohort; see `Cohort.from_gdc`."""
    listed = files(path)
    others = listed[~listed["name"].str.lower().str.endswith(".svs")]
    if len(others):
        raise InputError(
            f"{path} lists {len(others)} files that are no slides ({others['name'].iloc[0]}); "
            "at GDC, choose data type Slide Image only"
        )
    folder = Path(folder) if folder is not None else Path(path).resolve().parent
    known = source_sites(SITES if sites is None else sites)
    rows = [_row(item, folder.absolute(), known, path) for item in listed.itertuples()]
    made = pd.DataFrame(rows)
    twice = made["slide_id"].duplicated(keep=False)  # one glass scanned twice
    made.loc[twice, "slide_id"] = [name.removesuffix(".svs") for name in listed["name"][twice]]
    _name_missing(made["path"], folder, path)
    return made


def _row(item, folder: Path, sites: pd.DataFrame, source: str | Path) -> dict:
    try:
        found = barcode(item.name)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    project, centre = _site(found, item.project, sites, source)
    return {
        "slide_id": found.slide,
        "path": str(folder / item.id / item.name),
        "patient_id": found.patient,
        "centre": centre,
        "project": project,
        "source_site": found.site,
        "section": found.section,
        "sample": found.sample,
    }


def _site(found: Barcode, project: str | None, sites: pd.DataFrame, source: str | Path) -> tuple[str, str]:
    """Project and centre of a barcode's code. Raises InputError where the tables do not agree."""
    if found.site not in sites.index:
        raise InputError(
            f"{source}: {found.slide} has the source site '{found.site}', which the table of codes lacks; "
            "give one that has it as sites="
        )
    site = sites.loc[found.site]
    if project is not None and project != site["project"]:
        raise InputError(
            f"{source} says that {found.slide} is of {project}, and the table of codes that "
            f"{found.site} is of {site['project']}; mend one"
        )
    return site["project"], site["centre"]


def _name_missing(paths: pd.Series, folder: Path, source: str | Path) -> None:
    missing = [path for path in paths if not Path(path).is_file()]
    if not missing:
        return
    shown = ", ".join(str(Path(path).relative_to(folder.absolute())) for path in missing[:3])
    told = (
        f"{len(missing)} of the {len(paths)} files are not in {folder} ({shown}{', ...' if len(missing) > 3 else ''})"
    )
    fetch = f"fetch them with: python -m pathfm fetch {source} --folder {folder}"
    if len(missing) == len(paths):
        raise InputError(f"{told}; {fetch}")
    warnings.warn(f"{told}, so indexing will quarantine them; {fetch}", stacklevel=4)


def _read(path: Path) -> pd.DataFrame:
    """A table of text, by tabs or, in a .csv, by commas: a code is NA and no missing value."""
    between = "," if path.suffix.lower() == ".csv" else "\t"
    try:
        found = pd.read_csv(path, sep=between, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give the path of a table from GDC") from None
    except pd.errors.EmptyDataError:
        raise InputError(f"{path} is empty; it needs the columns {', '.join(MANIFEST)}") from None
    except (pd.errors.ParserError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path} is no tab-separated table ({error}); download it from GDC again") from None
    if found.empty:
        raise InputError(f"{path} lists no files")
    return found

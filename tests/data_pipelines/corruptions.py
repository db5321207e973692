"""Five hundred damaged or odd files, made by code, and the reading of them under watch.

``python -m tests.data_pipelines.corruptions FOLDER`` reads every file of the corpus there and
prints what came of it: an error, the volume that was meant, another one; and time and memory.
"""

import gzip
import io
import itertools
import json
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from data_pipelines.case import Volume
from data_pipelines.faults import DataError
from data_pipelines.reading.volume_io import read_volume
from tests.data_pipelines.fabricate import affine

SHAPE = (8, 24, 24)
KINDS = ("nii", "nii.gz", "mha", "packed.mha", "mhd", "nrrd", "packed.nrrd")
BOMB_MIB = 192


def meant() -> Volume:
    """The volume that every file of the corpus held before it was damaged."""
    rng = np.random.default_rng(0)
    return Volume(rng.integers(0, 60, SHAPE).astype(np.int16), affine())


def atomic_file(folder: Path, kind: str) -> bytes:
    """The undamaged bytes of a kind of file; the voxels of ``mhd`` stay in ``folder``."""
    volume = meant()
    if kind.startswith("nii"):
        content = nib.Nifti1Image(volume.array.T, volume.affine).to_bytes()
        return gzip.compress(content, mtime=0) if kind == "nii.gz" else content
    path = folder / f"whole.{kind}"
    sitk.WriteImage(itk_image(volume), str(path), useCompression=kind.startswith("packed"))
    content = path.read_bytes()
    if kind != "mhd":
        path.unlink()
    return content


def itk_image(volume: Volume) -> sitk.Image:
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image = sitk.GetImageFromArray(volume.array)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    return image


def corpus(folder: Path) -> Iterator[tuple[str, bytes]]:
    """File names and contents. A name that begins with ``same`` is odd but sound."""
    whole = {kind: atomic_file(folder, kind) for kind in KINDS}
    rng = np.random.default_rng(1)
    for kind, content in whole.items():
        yield f"same-whole.{kind}", content
        for i, share in enumerate(np.linspace(0.01, 0.99, 18)):
            yield f"truncated-{i}.{kind}", content[: int(len(content) * share)]
        if kind != "mhd":  # a text that may end anyhow
            yield f"truncated-by-one.{kind}", content[:-1]
            sound = "same-" if kind in ("nii", "mha", "nrrd") else ""  # as nibabel and ITK read it
            yield f"{sound}longer-0.{kind}", content + b"\1"
            yield f"longer-1.{kind}", content + b"garbage" * 100
        yield f"empty.{kind}", b""
        yield f"text.{kind}", b"this is no image\n" * 40
        yield f"zeros.{kind}", bytes(5000)
        yield f"noise.{kind}", rng.bytes(5000)
        yield f"other-format.{kind}", whole["nrrd" if "nrrd" not in kind else "nii"]
    for kind in ("nii.gz", "packed.mha", "packed.nrrd"):
        content = whole[kind]
        start = {"nii.gz": 10, "packed.mha": content.find(b"LOCAL\n") + 6}.get(
            kind, content.find(b"\n\n") + 12
        )
        for i, place in enumerate(np.linspace(start, len(content) - 1, 60).astype(int)):
            damaged = bytearray(content)
            damaged[place] ^= 0x55
            yield f"flipped-{i}.{kind}", bytes(damaged)
    yield from nifti_headers(whole["nii"])
    yield from text_headers(whole)
    yield from odd_images()
    yield from bombs(whole)


def nifti_headers(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Headers that lie, with and without gzip."""

    def changed(**fields) -> bytes:
        header = np.frombuffer(content[:348], nib.Nifti1Header.template_dtype).copy()
        for name, value in fields.items():
            header[0][name] = value
        return header.tobytes() + content[348:]

    nan_row, zero_row = (np.nan, 0, 0, 0), (0, 0, 0, 0)
    cases = {
        "magic": {"magic": b"xyz"},
        "pair-magic": {"magic": b"ni1"},
        "header-size": {"sizeof_hdr": 1},
        "dims-negative": {"dim": (3, -24, 24, 8, 1, 1, 1, 1)},
        "dims-zero": {"dim": (3, 24, 0, 8, 1, 1, 1, 1)},
        "dims-huge": {"dim": (3, 32767, 32767, 32767, 1, 1, 1, 1)},
        "dims-more": {"dim": (3, 24, 24, 9, 1, 1, 1, 1)},
        "dims-fewer": {"dim": (3, 24, 24, 7, 1, 1, 1, 1)},
        "dims-4d": {"dim": (4, 24, 24, 4, 2, 1, 1, 1)},
        "dims-2d": {"dim": (2, 24, 192, 1, 1, 1, 1, 1)},
        "dims-none": {"dim": (0, 0, 0, 0, 0, 0, 0, 0)},
        "dims-many": {"dim": (99, 24, 24, 8, 1, 1, 1, 1)},
        "type-unknown": {"datatype": 999},
        "type-none": {"datatype": 0},
        "type-wider": {"datatype": 64, "bitpix": 64},
        "type-narrower": {"datatype": 2, "bitpix": 8},
        "offset-negative": {"vox_offset": -1},
        "offset-nan": {"vox_offset": np.nan},
        "offset-huge": {"vox_offset": 1e30},
        "offset-late": {"vox_offset": 5000},
        "affine-nan": {"srow_x": nan_row},
        "affine-inf": {"srow_z": (0, np.inf, 0, 0)},
        "affine-zero": {"srow_y": zero_row},
        "affine-singular": {"srow_x": (1, 1, 0, 0), "srow_y": (1, 1, 0, 0)},
        "place-none": {"sform_code": 0, "qform_code": 0},
        "place-two": {"qform_code": 1, "qoffset_x": 300},
        "spacing-zero": {"sform_code": 0, "qform_code": 1, "pixdim": (1, 0, 1, 3, 1, 1, 1, 1)},
        "spacing-nan": {"sform_code": 0, "qform_code": 1, "pixdim": (1, np.nan, 1, 3, 1, 1, 1, 1)},
        "scale-inf": {"scl_slope": np.inf, "scl_inter": 0},
    }
    for name, fields in cases.items():
        yield f"{name}.nii", changed(**fields)
        yield f"{name}.nii.gz", gzip.compress(changed(**fields), mtime=0)


def text_headers(whole: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """Fields of MetaImage and NRRD headers that lie or are damaged."""
    metaimage = {
        b"NDims": (b"2", b"-3", b"1000000", b"x"),
        b"DimSize": (b"-24 24 8", b"0 24 8", b"99999 99999 99999", b"24 24", b"24 24 9", b"x y z"),
        b"ElementType": (b"MET_DOUBLE", b"MET_UCHAR", b"MET_STRING", b""),
        b"ElementSpacing": (b"0 1 3", b"nan 1 3", b"1 1", b"1 x 3"),
        b"TransformMatrix": (b"nan 0 0 0 1 0 0 0 1", b"0 0 0 0 0 0 0 0 0", b"1 0 0 1 0 0 0 0 1"),
        b"Offset": (b"nan 0 0", b"inf 0 0", b"0 0"),
        b"ElementDataFile": (b"none.raw", b"LIST", b"slice%03d.raw 1 8 1", b""),
        b"BinaryData": (b"False",),
        b"CompressedData": (b"Maybe-True",),
        b"ElementNumberOfChannels": (b"3", b"0", b"x"),
    }
    nrrd = {
        b"dimension": (b"2", b"4", b"16", b"x"),
        b"sizes": (b"-24 24 8", b"0 24 8", b"99999 99999 99999", b"24 24", b"24 24 9", b"x"),
        b"type": (b"double", b"uchar", b"block", b"x"),
        b"encoding": (b"hex", b"bzip2", b"x"),
        b"space": (b"nowhere", b"scanner-xyz"),
        b"space directions": (b"(nan,0,0) (0,1,0) (0,0,3)", b"(0,0,0) (0,1,0) (0,0,3)", b"x"),
        b"space origin": (b"(nan,0,0)", b"(0,0)"),
        b"byte skip": (b"-1",),
        b"data file": (b"none.raw",),
    }
    for kind in ("mha", "packed.mha", "mhd"):
        for (key, values), separator in zip(metaimage.items(), itertools.repeat(b" = ")):
            for i, value in enumerate(values):
                if kind == "mhd" and key == b"ElementDataFile" and value == b"":
                    continue
                yield f"{key.decode()}-{i}.{kind}", with_field(whole[kind], key, separator, value)
        for key in (b"DimSize", b"TransformMatrix", b"Offset", b"ElementSpacing", b"ElementType"):
            yield f"no-{key.decode()}.{kind}", whole[kind].replace(key, b"X" + key)
    for kind in ("nrrd", "packed.nrrd"):
        for key, values in nrrd.items():
            for i, value in enumerate(values):
                name = f"{key.decode().replace(' ', '-')}-{i}.{kind}"
                yield name, with_field(whole[kind], key, b": ", value)
        for key in (b"sizes", b"type", b"space directions", b"space origin", b"encoding"):
            yield (
                f"no-{key.decode().replace(' ', '-')}.{kind}",
                whole[kind].replace(key, b"X" + key),
            )


def with_field(content: bytes, key: bytes, separator: bytes, value: bytes) -> bytes:
    """A text header with one field set, before the last or before the blank line."""
    line = key + separator + value + b"\n"
    start = content.find(b"\n" + key + separator)
    if start >= 0:
        end = content.find(b"\n", start + 1)
        return content[: start + 1] + line + content[end + 1 :]
    place = content.find(b"\nElementDataFile") if separator == b" = " else content.find(b"\n\n")
    return content[: place + 1] + line + content[place + 1 :]


def odd_images() -> Iterator[tuple[str, bytes]]:
    """Whole files that are not what is wanted, or are in an unusual way."""
    volume = meant()
    ijk = volume.array.T

    def nifti(array, kind=nib.Nifti1Image) -> bytes:
        return kind(array, volume.affine).to_bytes()

    rgb = np.zeros(ijk.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    big = nib.Nifti1Image(ijk, volume.affine)
    big_endian = nib.Nifti1Image(ijk.astype(">i2"), volume.affine, big.header.as_byteswapped(">"))
    nan = ijk.astype(np.float32)
    nan[3, 3, 3] = np.nan
    for suffix, pack in (("nii", bytes), ("nii.gz", lambda c: gzip.compress(c, mtime=0))):
        yield f"same-big-endian.{suffix}", pack(big_endian.to_bytes())
        yield f"same-float64.{suffix}", pack(nifti(ijk.astype(np.float64)))
        yield f"same-nifti2.{suffix}", pack(nifti(ijk, nib.Nifti2Image))
        yield f"same-trailing-axis.{suffix}", pack(nifti(ijk[..., None]))
        yield f"rgb.{suffix}", pack(nifti(rgb))
        yield f"complex.{suffix}", pack(nifti(ijk.astype(np.complex64)))
        yield f"4d.{suffix}", pack(nifti(np.stack([ijk, ijk], -1)))
        yield f"2d.{suffix}", pack(nifti(ijk[..., 0]))
        yield f"nan.{suffix}", pack(nifti(nan))
        yield f"inf.{suffix}", pack(nifti(np.where(np.isnan(nan), np.inf, nan)))
    yield (
        "same-packed-twice.nii.gz",
        gzip.compress(nifti(ijk)[:500]) + gzip.compress(nifti(ijk)[500:]),
    )


def bombs(whole: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """Small files that unpack to much: with a header that admits it, and with one that does not."""
    packer = zlib.compressobj(9, wbits=31)
    block = bytes(2**20)
    zeros = b"".join(packer.compress(block) for _ in range(BOMB_MIB)) + packer.flush()
    header = bytearray(whole["nii"][:352])
    yield "bomb-hidden.nii.gz", gzip.compress(whole["nii"]) + zeros
    header[40:56] = np.array((3, 2048, 2048, 512, 1, 1, 1, 1), "<i2").tobytes()
    yield "bomb-admitted.nii.gz", gzip.compress(bytes(header)) + zeros
    header[40:56] = np.array((3, 1024, 1024, 60, 1, 1, 1, 1), "<i2").tobytes()
    yield "bomb-of-zeros-too-short.nii.gz", gzip.compress(bytes(header)) + gzip.compress(bytes(999))
    for kind, field, size in (("packed.mha", b"DimSize", b" = "), ("packed.nrrd", b"sizes", b": ")):
        start = whole[kind].find(b"LOCAL\n") + 6 if "mha" in kind else whole[kind].find(b"\n\n") + 2
        hidden = whole[kind][:start] + zeros
        yield f"bomb-hidden.{kind}", hidden
        yield f"bomb-admitted.{kind}", with_field(hidden, field, size, b"2048 2048 512")


def special(folder: Path) -> list[Path]:
    """What is no regular file."""
    paths = []
    for kind in KINDS:
        path = folder / f"directory.{kind}"
        path.mkdir()
        paths.append(path)
    pipe = folder / "pipe.nii"
    os.mkfifo(pipe)
    link = folder / "dangling.nii.gz"
    link.symlink_to(folder / "nowhere.nii.gz")
    empty = folder / "no-series"
    empty.mkdir()
    unreadable = folder / "unreadable.nii"
    unreadable.write_bytes(b"no matter")
    unreadable.chmod(0)
    return [*paths, pipe, link, empty, unreadable, folder / "absent.nrrd"]


def outcome(path: Path, read: Callable[[Path], Volume] = read_volume) -> str:
    """``error``, ``same`` or ``other``; or what should never be."""
    try:
        volume = read(path)
    except DataError as error:
        named = str(path) in str(error) and error.file == path
        return "error" if named else f"an error that does not name the file: {error}"
    expected = meant()
    same = (
        volume.shape == expected.shape
        and np.array_equal(volume.array, expected.array)
        and np.allclose(volume.affine, expected.affine, atol=1e-4)
    )
    return "same" if same else "other"


def main(folder: Path) -> None:
    """Write and read the corpus."""
    paths = []
    for name, content in corpus(folder):
        (folder / name).write_bytes(content)
        paths.append(folder / name)
    paths += special(folder)
    results = []
    for path in paths:
        start = time.perf_counter()
        result = outcome(path)
        results.append([path.name, result, time.perf_counter() - start])
    # getrusage would count what the process that started this one had in memory.
    status = Path("/proc/self/status").read_text("utf-8")
    peak = int(status.partition("VmHWM:")[2].split()[0])
    output = {"results": results, "peak_mib": peak / 1024}
    io.TextIOWrapper(sys.stdout.buffer, encoding="utf-8").write("\n" + json.dumps(output) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

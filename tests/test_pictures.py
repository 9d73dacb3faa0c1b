"""Images of every mode and depth as a person sees them, where they are scored and where they train."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from spo.errors import UserError
from spo.evaluation.image_sets import ImageSet, image_set
from spo.lora_io.model_spec import ModelSpec
from spo.preference.batches import decode_image, decode_pair
from spo.run.pictures import MAX_PIXELS, read_picture

GREY, RED, GREEN, WHITE = (128, 128, 128), (255, 0, 0), (0, 255, 0), (255, 255, 255)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, colour, rows=None, extra=b""):
    """Encodes a PNG by hand: PIL writes few of these modes. Without rows, all its samples are 0."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    if rows is None:
        packer, row = zlib.compressobj(9), b"\0" * (1 + (width * samples * depth + 7) // 8)
        pixels = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    else:
        pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = chunk(b"IHDR", header) + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def shorts(*values):
    return struct.pack(f">{len(values)}H", *values)


def palette_with_transparency():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putdata([0, 1])
    return saved(image, "PNG", transparency=bytes([255, 0]))


SIXTEEN = np.array([[0, 32896, 65535]], np.uint16)
CASES = {
    "16 bit grey": (png(3, 1, 16, 0, [shorts(0, 0x8080, 0xFFFF)]), [(0,) * 3, GREY, WHITE]),
    "16 bit grey, one clear": (
        png(2, 1, 16, 0, [shorts(0x8080, 5)], chunk(b"tRNS", shorts(5))),
        [GREY, WHITE],
    ),
    "16 bit grey and alpha": (png(2, 1, 16, 4, [shorts(0, 0, 0, 65535)]), [WHITE, (0,) * 3]),
    "16 bit RGB": (png(1, 1, 16, 2, [shorts(65535, 0, 0)]), [RED]),
    "16 bit RGB, one clear": (
        png(2, 1, 16, 2, [shorts(65535, 0, 0, 9, 999, 9)], chunk(b"tRNS", shorts(9, 999, 9))),
        [RED, WHITE],
    ),
    "2 bit grey": (png(4, 1, 2, 0, [b"\x1b"]), [(0,) * 3, (85,) * 3, (170,) * 3, WHITE]),
    "1 bit": (png(2, 1, 1, 0, [b"\x40"]), [(0,) * 3, WHITE]),
    "16 bit TIFF": (saved(Image.fromarray(SIXTEEN), "TIFF"), [(0,) * 3, GREY, WHITE]),
    "16 bit TIFF, white is zero": (
        saved(Image.fromarray(SIXTEEN), "TIFF", tiffinfo={262: 0}),
        [WHITE, (127,) * 3, (0,) * 3],
    ),
    "16 bit PGM": (b"P5 3 1 65535\n" + shorts(0, 0x8080, 65535), [(0,) * 3, GREY, WHITE]),
    "10 bit PGM": (b"P5 2 1 1023\n" + shorts(0, 1023), [(0,) * 3, WHITE]),
    "grey and alpha": (saved(Image.new("LA", (1, 1), (0, 0)), "PNG"), [WHITE]),
    "half clear": (saved(Image.new("RGBA", (1, 1), (255, 0, 0, 51)), "PNG"), [(255, 204, 204)]),
    "clear WebP": (saved(Image.new("RGBA", (1, 1)), "WEBP", lossless=True), [WHITE]),
    "palette": (palette_with_transparency(), [RED, WHITE]),
    "GIF": (saved(Image.new("P", (1, 1), 3), "GIF", transparency=3), [WHITE]),
    "CMYK": (saved(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "TIFF"), [RED]),
}


@pytest.mark.parametrize("name", CASES)
def test_what_a_person_sees_is_what_counts(tmp_path, name):
    data, expected = CASES[name]
    (tmp_path / "image").write_bytes(data)
    for image in (read_picture(data), ImageSet("x", (tmp_path / "image",)).read(0, "a fox")):
        assert image.mode == "RGB" and image.size == (len(expected), 1)
        assert [tuple(map(int, pixel)) for pixel in np.asarray(image)[0]] == expected
    one = decode_image({"bytes": data}, 1)  # of the preference model's data: the centre
    assert tuple(map(int, one[0, 0])) == expected[round((len(expected) - 1) / 2)]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright(kind, orientation):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16], upright[8:, 16:] = RED, GREEN
    # What a camera stores, from what is seen: EXIF 2.3, tag 274.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored))
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
    seen = np.asarray(read_picture(saved(image, kind, exif=exif, **options.get(kind, {}))))
    assert seen.shape == upright.shape
    assert np.abs(seen.astype(int) - upright).mean() < 2


def test_a_damaged_exif_block_is_no_damaged_image():
    image = Image.new("RGB", (4, 3), RED)
    assert read_picture(saved(image, "PNG", exif=b"Exif\0\0MM\0*\0\0\xff\xff")).size == (4, 3)


def test_plain_images_stay_as_they_are():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    image = read_picture(saved(Image.fromarray(pixels), "PNG"))
    assert np.array_equal(np.asarray(image), pixels)


UNFIT = {
    "floating-point numbers": saved(Image.new("F", (2, 2), 0.5), "TIFF"),
    "32 bit integers": saved(Image.new("I", (2, 2), 70000), "TIFF"),
    "PFM": b"Pf 1 1 -1.0\n" + struct.pack("<f", 0.5),
    "176 megapixels": png(13272, 13272, 1, 0),
    "just too many pixels": png(8193, 4097, 1, 0),
    "2^31 pixels": png(65536, 32768, 1, 0, []),
    "more pixels than a number holds": png(2**31 - 1, 2**31 - 1, 1, 0, []),
    "a hair": png(5100, 100, 1, 0),
    "a cut file": png(64, 64, 8, 2)[:60],
    "nothing": b"",
    "no image": b"no image",
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_cannot_be_seen_is_refused_or_left_out(tmp_path, name):
    data = UNFIT[name]
    with pytest.raises(ValueError, match="."):
        read_picture(data)
    sound = saved(Image.new("RGB", (8, 8)), "PNG")
    assert decode_pair({"jpg_0": sound, "jpg_1": sound}, 8) is not None
    assert decode_pair({"jpg_0": sound, "jpg_1": data}, 8) is None  # counted as left out
    (tmp_path / "0.png").write_bytes(data)
    with pytest.raises(UserError, match=r"0\.png") as error:
        ImageSet("x", (tmp_path / "0.png",)).read(0, "a fox")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["176 megapixels", "2^31 pixels", "a hair", "no image"])
def test_a_folder_is_refused_before_any_model_loads(tmp_path, name):
    (tmp_path / "0.png").write_bytes(saved(Image.new("RGB", (8, 8)), "PNG"))
    (tmp_path / "1.png").write_bytes(UNFIT[name])
    spec = ModelSpec("x", "x", None, images=tmp_path)
    with pytest.raises(UserError, match=r"models: .*1\.png cannot be scored as an image"):
        image_set(tmp_path, spec, ["a fox", "a whale"])


def test_sizes_are_looked_at_before_pixels(tmp_path):
    assert MAX_PIXELS >= 8192 * 4096  # as many as 8K video has, and no more
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png(9000, 9000, 8, 2))
    assert bomb.stat().st_size < 300_000
    code = (
        "import resource, sys\nfrom spo.run.pictures import read_picture\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    read_picture(sys.argv[1])\nexcept ValueError as error:\n    print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    found = subprocess.run([sys.executable, "-c", code, bomb], capture_output=True, text=True)
    said, kilobytes = found.stdout.splitlines()
    assert said.startswith("9000 x 9000 pixels; at most 33,554,432") and int(kilobytes) < 20_000
    assert found.stderr == ""  # PIL warns of large images

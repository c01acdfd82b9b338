"""Images made smaller, or at least looked at, on their way into shards."""

import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeGuard

from infobatch_stream.convert.label_images import is_image_column
from infobatch_stream.errors import ConfigError, DataError, MissingExtraError
from infobatch_stream.formats.extensions import is_image
from infobatch_stream.formats.schema import MEMBERS, Column, Encoded, EncodedImage, Sample

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Reencoder"]

_ENCODINGS = ("jpeg", "png")  # MDS encodings of images
_ORIENTATION = 0x0112  # the EXIF tag; from 5 on height and width change places
_PIXELS = 1 << 28  # of an image, beyond which it is taken for damaged (or for an attack)


@dataclass(frozen=True)
class Reencoder:
    """Decodes the images of a sample. They are encoded again with ``resize`` or ``quality``, else only checked.

    resize: pixels of the shorter side; larger images are made smaller. quality: of JPEG, 1 to 95; default 90.
    A PNG stays a PNG and a JPEG a JPEG; other kinds become JPEG. Metadata is dropped, its rotation is applied.
    chosen: the columns that are encoded again, None for all with images; the others are only decoded, with ``check``.
    labels: those with label images, which are made smaller by nearest neighbour, and become PNG.
    """

    resize: int | None = None
    quality: int | None = None
    chosen: frozenset[str] | None = None
    labels: frozenset[str] = frozenset()
    check: bool = False

    def __post_init__(self) -> None:
        """Raises ConfigError, and MissingExtraError."""
        if self.resize is not None and self.resize < 1:
            raise ConfigError(f"resize is {self.resize}; give the pixels of the shorter side, 1 or more.")
        if self.quality is not None and not 1 <= self.quality <= 95:
            raise ConfigError(f"quality is {self.quality}; 1 to 95 are possible.")
        try:
            import PIL  # noqa: F401
        except ImportError as error:
            raise MissingExtraError.of("pillow", "tools") from error

    @staticmethod
    def check_columns(sets: Iterable[Mapping[str, Column]], where: object) -> None:
        """Raise ConfigError where a set of columns has no image among them."""
        for columns in sets:
            if not any(map(is_image_column, columns.values())):
                there = ", ".join(f"{name} ({column.mds})" for name, column in columns.items())
                raise ConfigError(
                    f"{where} has no column of images to look at or to make smaller, only {there}. Say which one holds "
                    "images (--encoding NAME=jpeg), or leave out --check, --resize and --quality."
                )

    def __call__(self, sample: Sample, columns: Mapping[str, Column]) -> Sample:
        """``sample`` with its images. Raises DataError for one that cannot be decoded, without saying where it lies."""
        result = dict(sample)
        for name, value in sample.items():
            if not _is_image(value, columns[name]):
                continue
            if not value.data and MEMBERS in sample and not isinstance(value, EncodedImage):  # its member is missing
                continue
            try:
                result[name] = image = self._image(name, value)
            except DataError as error:
                raise DataError(f"{error} (in the column {name!r})") from error
            if MEMBERS in sample and isinstance(value, EncodedImage) and isinstance(image, EncodedImage):
                members = json.loads(result[MEMBERS])
                members[members.index(value.extension)] = image.extension
                result[MEMBERS] = json.dumps(members)
        return result

    def _image(self, name: str, value: Encoded) -> Encoded:
        from PIL import UnidentifiedImageError

        try:
            if self.chosen is None or name in self.chosen:
                return self._encoded(value, labels=name in self.labels)
            return replace(self, resize=None, quality=None)._encoded(value, labels=False) if self.check else value
        except DataError:
            raise
        except UnidentifiedImageError:
            raise DataError("an image cannot be decoded: it is none that PIL knows") from None
        except (Exception, MemoryError) as error:  # decoders raise nearly anything
            raise DataError(f"an image cannot be decoded, or not encoded again ({error})") from error

    def _encoded(self, value: Encoded, *, labels: bool) -> Encoded:
        from PIL import Image, ImageOps

        with Image.open(io.BytesIO(value.data)) as image:
            if image.width * image.height > _PIXELS:
                raise DataError(f"an image of {image.width:,} x {image.height:,} pixels")
            kind, size = image.format, image.size
            if self.resize is not None:
                image.draft(None, (self.resize, self.resize))  # JPEG decodes at a lower scale, no smaller than this
            image.load()
            if self.resize is None and self.quality is None:
                return value
            turned = ImageOps.exif_transpose(image)
            if image.getexif().get(_ORIENTATION, 1) > 4:
                size = size[::-1]
        if self.resize is not None and min(size) > self.resize:
            share = self.resize / min(size)  # of the whole image, not of what was decoded: a mask becomes as large
            turned = _resized(turned, [max(1, round(side * share)) for side in size], labels=labels)
        stream = io.BytesIO()
        if kind == "PNG" or labels:
            turned.save(stream, "PNG")
        elif turned.mode[0] in "IF":
            raise DataError(f"an image of the mode {turned.mode} has more than 8 bits, which JPEG cannot hold")
        else:
            turned.convert("RGB" if turned.mode not in ("L", "CMYK") else turned.mode).save(
                stream, "JPEG", quality=self.quality or 90
            )
        if isinstance(value, EncodedImage) and kind not in (("PNG",) if labels else ("PNG", "JPEG")):
            prefix, dot, _ = value.extension.rpartition(".")
            return EncodedImage(stream.getvalue(), f"{prefix}{dot}{'png' if labels else 'jpg'}")
        return replace(value, data=stream.getvalue())


def _resized(image: "Image", size: list[int], *, labels: bool) -> "Image":
    """``image`` in another size; of labels, which are numbers, no means are taken."""
    from PIL.Image import Resampling

    if labels:
        return image.resize(size, Resampling.NEAREST)
    if image.mode in ("1", "P"):  # of which Pillow takes none either
        image = image.convert("L" if image.mode == "1" else "RGBA" if "transparency" in image.info else "RGB")
    return image.resize(size, Resampling.LANCZOS)


def _is_image(value: object, column: Column) -> TypeGuard[Encoded]:
    """Whether a value is an image: by its column, or by the extension that it has in a tar."""
    named = isinstance(value, EncodedImage) and is_image(value.extension)
    return isinstance(value, Encoded) and (column.mds in _ENCODINGS or named)

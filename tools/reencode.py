"""Images made smaller, or at least looked at, on their way into shards."""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

from infobatch_stream.errors import ConfigError, DataError, MissingExtraError

from .samples import MEMBERS, Column, Encoded, EncodedImage, Sample

__all__ = ["Reencoder"]

_ENCODINGS = ("jpeg", "png")  # MDS encodings of images
_PIXELS = 1 << 28  # of an image, beyond which it is taken for damaged (or for an attack)


@dataclass(frozen=True)
class Reencoder:
    """Decodes the images of a sample. They are encoded again with ``resize`` or ``quality``, else only checked.

    resize: pixels of the shorter side; larger images are made smaller. quality: of JPEG, 1 to 95; default 90.
    A PNG stays a PNG and a JPEG a JPEG; other kinds become JPEG. Metadata is dropped, its rotation is applied.
    """

    resize: int | None = None
    quality: int | None = None

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

    def __call__(self, sample: Sample, columns: Mapping[str, Column]) -> Sample:
        """``sample`` with its images. Raises DataError for one that cannot be decoded, without saying where it lies."""
        result = dict(sample)
        for name, value in sample.items():
            if isinstance(value, Encoded) and value.data and columns[name].mds in _ENCODINGS:
                result[name] = image = self._image(value)
                if MEMBERS in sample and isinstance(value, EncodedImage) and isinstance(image, EncodedImage):
                    members = json.loads(result[MEMBERS])
                    members[members.index(value.extension)] = image.extension
                    result[MEMBERS] = json.dumps(members)
        return result

    def _image(self, value: Encoded) -> Encoded:
        from PIL import UnidentifiedImageError

        try:
            return self._encoded(value)
        except DataError:
            raise
        except UnidentifiedImageError:
            raise DataError("an image cannot be decoded: it is none that PIL knows") from None
        except (Exception, MemoryError) as error:  # decoders raise nearly anything
            raise DataError(f"an image cannot be decoded, or not encoded again ({error})") from error

    def _encoded(self, value: Encoded) -> Encoded:
        from PIL import Image, ImageOps

        with Image.open(io.BytesIO(value.data)) as image:
            if image.width * image.height > _PIXELS:
                raise DataError(f"an image of {image.width:,} x {image.height:,} pixels")
            kind = image.format
            if self.resize is not None:
                image.draft(None, (self.resize, self.resize))  # JPEG decodes at a lower scale, no smaller than this
            image.load()
            if self.resize is None and self.quality is None:
                return value
            turned = ImageOps.exif_transpose(image)
        if self.resize is not None and min(turned.size) > self.resize:
            share = self.resize / min(turned.size)
            turned = turned.resize([max(1, round(side * share)) for side in turned.size], Image.Resampling.LANCZOS)
        stream = io.BytesIO()
        if kind == "PNG":
            turned.save(stream, "PNG")
        elif turned.mode[0] in "IF":
            raise DataError(f"an image of the mode {turned.mode} has more than 8 bits, which JPEG cannot hold")
        else:
            turned.convert("RGB" if turned.mode not in ("L", "CMYK") else turned.mode).save(
                stream, "JPEG", quality=self.quality or 90
            )
        if isinstance(value, EncodedImage) and kind not in ("PNG", "JPEG"):
            prefix, dot, _ = value.extension.rpartition(".")
            return EncodedImage(stream.getvalue(), f"{prefix}{dot}jpg")
        return replace(value, data=stream.getvalue())

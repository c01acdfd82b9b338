"""What can be converted, read by position."""

from infobatch_stream.convert.readers.detect import read_source
from infobatch_stream.convert.readers.idx import read_idx
from infobatch_stream.convert.readers.images import read_images
from infobatch_stream.convert.readers.mds import MdsSet
from infobatch_stream.convert.readers.table import TableSet
from infobatch_stream.convert.readers.tars import TarSet

__all__ = ["MdsSet", "TableSet", "TarSet", "read_idx", "read_images", "read_source"]

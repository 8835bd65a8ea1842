"""Image data: sources, the packed uint8 store, and the order in which it is read."""

from maskdm_fast.data.dataset import UnreadableImagesError, find_source, open_dataset, pack
from maskdm_fast.data.idx import IdxSource, idx_source
from maskdm_fast.data.order import DataOrder
from maskdm_fast.data.sources import (
    EMOJI_ATTRIBUTION,
    ImageSource,
    decode_image,
    emoji_source,
    folder_source,
)
from maskdm_fast.data.store import ImageStore, StoreError, StoreHeader, write_store

__all__ = [
    "EMOJI_ATTRIBUTION",
    "DataOrder",
    "IdxSource",
    "ImageSource",
    "ImageStore",
    "StoreError",
    "StoreHeader",
    "UnreadableImagesError",
    "decode_image",
    "emoji_source",
    "find_source",
    "folder_source",
    "idx_source",
    "open_dataset",
    "pack",
    "write_store",
]

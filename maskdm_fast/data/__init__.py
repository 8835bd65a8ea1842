"""Image data: sources, the packed uint8 store, and the order in which it is read."""

from maskdm_fast.data.dataset import UnreadableImagesError, open_dataset, pack
from maskdm_fast.data.order import DataOrder
from maskdm_fast.data.sources import (
    EMOJI_ATTRIBUTION,
    ImageSource,
    decode_image,
    emoji_source,
    find_source,
    folder_source,
)
from maskdm_fast.data.store import ImageStore, StoreError, StoreHeader, write_store

__all__ = [
    "EMOJI_ATTRIBUTION",
    "DataOrder",
    "ImageSource",
    "ImageStore",
    "StoreError",
    "StoreHeader",
    "UnreadableImagesError",
    "decode_image",
    "emoji_source",
    "find_source",
    "folder_source",
    "open_dataset",
    "pack",
    "write_store",
]

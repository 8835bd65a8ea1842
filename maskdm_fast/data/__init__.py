"""Image data: sources, the packed store, and the order in which it is read."""

from maskdm_fast.data.dataset import find_source, open_dataset
from maskdm_fast.data.idx import IdxSource, idx_source
from maskdm_fast.data.latents import LatentSource, latent_source
from maskdm_fast.data.nothing import no_images
from maskdm_fast.data.order import DataOrder
from maskdm_fast.data.packing import SHARD_BYTES, pack
from maskdm_fast.data.sources import (
    EMOJI_ATTRIBUTION,
    ImageSource,
    UnreadableImagesError,
    decode_image,
    emoji_source,
    folder_source,
)
from maskdm_fast.data.store import ImageStore
from maskdm_fast.data.store_file import LatentScaling, StoreError, StoreHeader, write_store
from maskdm_fast.data.tars import TarSource, is_tars, tar_source

__all__ = [
    "EMOJI_ATTRIBUTION",
    "SHARD_BYTES",
    "DataOrder",
    "IdxSource",
    "ImageSource",
    "ImageStore",
    "LatentScaling",
    "LatentSource",
    "StoreError",
    "StoreHeader",
    "TarSource",
    "UnreadableImagesError",
    "decode_image",
    "emoji_source",
    "find_source",
    "folder_source",
    "idx_source",
    "is_tars",
    "latent_source",
    "no_images",
    "open_dataset",
    "pack",
    "tar_source",
    "write_store",
]

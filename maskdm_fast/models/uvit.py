"""The U-ViT of MaskDM, and the original: a ViT with long skips that computes nothing for masked patches."""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maskdm_fast import random
from maskdm_fast.models.layers import Block, LayerNorm, Linear, timestep_embedding
from maskdm_fast.models.original import FinalConv, TimeMLP
from maskdm_fast.models.packing import Packing
from maskdm_fast.random import Stream

_INIT_STD = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class UViTConfig:
    """Shape of a `UViT`.

    Args:
        image_size: side of the square image in pixels, a multiple of `patch_size`.
        patch_size: side P of a patch in pixels.
        channels: image channels C.
        dim: token width D, even and a multiple of `num_heads`.
        depth: nominal depth; the network has ``2 * (depth // 2) + 1`` blocks, so 12 and 13 name the same one.
        num_heads: attention heads H.
        mlp_ratio: hidden width of the MLP over `dim`.
        qkv_bias: give q, k and v a bias.
        num_classes: 0 for an unconditional model; above, the model has a class token.
        time_mlp: pass the time token through an MLP, as the original U-ViT can.
        final_conv: end with a 3x3 convolution on the image, as the original U-ViT does. Such a model takes whole images
            only. To pretrain on visible patches leave it out; `transfer` adds it for the unmasked stage.

    Raises:
        ValueError: if a value is out of range or does not divide another.
    """

    image_size: int
    patch_size: int
    channels: int = 3
    dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    qkv_bias: bool = False
    num_classes: int = 0
    time_mlp: bool = False
    final_conv: bool = False

    def __post_init__(self):
        for name in ("image_size", "patch_size", "channels", "dim", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"UViTConfig: {name} is {getattr(self, name)}, want at least 1")
        if self.num_classes < 0:
            raise ValueError(f"UViTConfig: num_classes is {self.num_classes}, want 0 (unconditional) or more")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"UViTConfig: image_size {self.image_size} is not a multiple of patch_size {self.patch_size}; "
                f"choose an image_size of {_neighbours(self.image_size, self.patch_size)} or another patch_size"
            )
        if self.dim % self.num_heads:
            raise ValueError(
                f"UViTConfig: dim {self.dim} is not a multiple of num_heads {self.num_heads}; "
                f"choose a dim of {_neighbours(self.dim, self.num_heads)} or another num_heads"
            )
        if self.dim % 2:
            raise ValueError(
                f"UViTConfig: dim is {self.dim}, want an even number (half cosines, half sines of the time)"
            )
        if not 1 <= self.dim * self.mlp_ratio < math.inf:
            raise ValueError(f"UViTConfig: mlp_ratio is {self.mlp_ratio}, want at least 1/dim = {1 / self.dim:g}")

    @property
    def num_tokens(self) -> int:
        """Patches of one image, N."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def token_dim(self) -> int:
        """Values of one patch vector, P*P*C."""
        return self.patch_size**2 * self.channels

    @property
    def num_extras(self) -> int:
        """Tokens before the patches: the class token (if any) and the time token."""
        return 2 if self.num_classes else 1

    @property
    def num_blocks(self) -> int:
        """Transformer blocks: as many before as after the middle one."""
        return 2 * (self.depth // 2) + 1


class UViT(nn.Module):
    """U-ViT on the visible patches of an image.

        h = [class, time, W x_k] + positions[extras, ids_keep];  in-blocks, middle block, out-blocks with long skips;
        out = head(norm(h)) of the patch tokens

    Args:
        config: the shape.
        seed: of the initial weights, drawn from `Stream.INIT`; torch's global generator is neither read nor moved.
            Constructed under ``torch.device("meta")`` the model holds no values; give it memory with ``to_empty``, then
            call `reset_parameters`.

    Attributes:
        grid: rows and columns of the patches of its images.
        activation_checkpointing: keep only the inputs of the blocks for the backward pass and compute each block a
            second time there: the same gradients with less memory, for about a third more work. Off at first.

    Source: Lei et al., "Masked Diffusion Models Are Fast Distribution Learners", arXiv 2306.11363, on the network of
    Bao et al., "All are Worth Words: A ViT Backbone for Diffusion Models", CVPR 2023, whose final convolution and time
    MLP are options.
    """

    def __init__(self, config: UViTConfig, *, seed: int = 0):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.grid = (config.image_size // config.patch_size,) * 2
        dim = config.dim
        self.patch_embed = Linear(config.token_dim, dim)
        self.positions = nn.Parameter(torch.empty(config.num_extras + config.num_tokens, dim))
        if config.num_classes:
            self.label_embed = nn.Parameter(torch.empty(config.num_classes, dim))
            self.uncond_embed = nn.Parameter(torch.empty(dim))

        def block(skip: bool) -> Block:
            return Block(dim, config.num_heads, int(dim * config.mlp_ratio), qkv_bias=config.qkv_bias, skip=skip)

        half = config.num_blocks // 2
        self.in_blocks = nn.ModuleList(block(skip=False) for _ in range(half))
        self.mid_block = block(skip=False)
        self.out_blocks = nn.ModuleList(block(skip=True) for _ in range(half))
        self.norm = LayerNorm(dim)
        self.head = Linear(dim, config.token_dim)
        self.time_mlp = TimeMLP(dim) if config.time_mlp else None
        self.final_conv = FinalConv(self.grid[0], config.patch_size, config.channels) if config.final_conv else None
        self.reset_parameters(seed)

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Give every parameter its `initial_value`; those on the meta device are passed over."""
        for name, parameter in self.named_parameters():
            if not parameter.is_meta:
                parameter.copy_(self.initial_value(name, seed))

    def initial_value(self, name: str, seed: int) -> Tensor:
        """Draw the initial value of a parameter: parameter i of `named_parameters` is slot i of `Stream.INIT`.

        Matrices, positions and the unconditional embedding are N(0, 0.02^2) (the truncation of the published code lies
        at 100 standard deviations), biases 0, norms 1 and 0. The patch and label embeddings keep the distributions that
        PyTorch gives them: uniform within ``1/sqrt(fan_in)``, and N(0, 1). The final convolution is the identity.

        Args:
            name: as `named_parameters` gives it.
            seed: of the draw.

        Returns:
            float32, of the parameter's shape, on the CPU; the parameter itself may be on the meta device.
        """
        names = [known for known, _ in self.named_parameters()]
        parameter = self.get_parameter(name)
        draw = {
            "seed": seed,
            "stream": Stream.INIT,
            "step": 0,
            "slots": torch.tensor([names.index(name)], device="cpu"),
        }
        if name.startswith("patch_embed"):
            values = (2 * random.uniform(parameter.numel(), **draw) - 1) * self.config.token_dim**-0.5
        elif name.endswith("bias"):
            values = torch.zeros(parameter.numel(), device="cpu")
        elif "norm" in name:
            values = torch.ones(parameter.numel(), device="cpu")
        elif name == "final_conv.weight":
            values = self.final_conv.identity()
        else:
            values = random.normal(parameter.numel(), **draw) * (1.0 if name == "label_embed" else _INIT_STD)
        return values.view(parameter.shape)

    def forward(
        self,
        tokens: Tensor,
        t: Tensor,
        ids_keep: Tensor | None = None,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        tap: str | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predict one vector per visible patch.

        Args:
            tokens: ``[B, K, P*P*C]``, visible noisy patches, each ordered (py, px, c); packed ``[T, P*P*C]``.
            t: ``[B]``, integer or floating, about 0..1000; or ``[B, D]``, what `time_tokens` made of it.
            ids_keep: int64 ``[B, K]``, the place of each token among the N patches; None means all of them in order.
                Packed ``[T]``.
            labels: int64 ``[B]``, a class or -1 for the learned unconditional embedding; None means -1 for all. Must be
                None if the model has no classes.
            cu_seqlens: int32 ``[B + 1]``, cumulative token counts of the packed form, where images keep different
                counts. One attention call serves them all, and nothing is padded.
            tap: "encoder" to stop after the middle block, "both" to return what left it too: the features that a
                discriminator judges.

        Returns:
            ``[B, K, P*P*C]``, packed ``[T, P*P*C]``, in the compute dtype; for tap "encoder" the patch tokens after the
            middle block, ``[B, K, D]`` or ``[T, D]``, instead; for "both" prediction and tokens.

        Raises:
            ValueError: if shapes do not fit each other or the configuration, labels go to an unconditional model, or
                there is no such tap.
        """
        if tap not in (None, "encoder", "both"):
            raise ValueError(f"UViT: tap is {tap!r}, want 'encoder', 'both' or None")
        self._check(tokens, t, ids_keep, labels, cu_seqlens)
        extras = self.config.num_extras
        patches = self.patch_embed(tokens.to(self.patch_embed.weight.dtype))  # [B, K, D]
        dtype = patches.dtype
        # Rows are picked before the cast so that their gradients add up in the precision of the table.
        rows = self.positions[extras:] if ids_keep is None else F.embedding(ids_keep, self.positions[extras:])
        front = (t if t.ndim == 2 else self.time_tokens(t))[:, None]  # [B, 1, D]
        if self.config.num_classes:
            front = torch.cat((self._class_token(labels, t.shape[0]), front), dim=1)
        front = front + self.positions[:extras]
        front, patches = front.to(dtype), patches + rows.to(dtype)
        packing = None if cu_seqlens is None else Packing.of(cu_seqlens, extras, tokens.shape[0])
        if packing is None:
            x = torch.cat((front, patches), dim=1)  # [B, extras + K, D]
        else:
            x, cu_seqlens = packing.join(front, patches), packing.cu_seqlens  # [B extras + T, D]

        skips = []
        for block in self.in_blocks:
            x = self._run(block, x, None, cu_seqlens)
            skips.append(x)
        x = self._run(self.mid_block, x, None, cu_seqlens)
        features = None if tap is None else x[:, extras:] if packing is None else packing.patches(x)
        if tap == "encoder":
            return features
        for block in self.out_blocks:
            x = self._run(block, x, skips.pop(), cu_seqlens)
        # The extras are dropped after the head, where a token is P*P*C wide instead of D.
        out = self.head(self.norm(x))
        out = out[:, extras:] if packing is None else packing.patches(out)
        out = out if self.final_conv is None else self.final_conv(out)
        return out if tap is None else (out, features)

    def _run(self, block: Block, *inputs: Tensor | None) -> Tensor:
        if self.activation_checkpointing:
            # Nothing in a block draws random numbers, so there is no generator to put back.
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)

    def time_tokens(self, t: Tensor) -> Tensor:
        """The time token of each t, ``[S]`` to ``[S, D]``: a sampler asks once for the times of all its steps."""
        tokens = timestep_embedding(t, self.config.dim).to(self.positions.dtype)
        return tokens if self.time_mlp is None else self.time_mlp(tokens)

    def _class_token(self, labels: Tensor | None, batch: int) -> Tensor:
        """One ``[B, 1, D]`` token: the row of the class, or the unconditional embedding."""
        uncond = self.uncond_embed.expand(batch, -1)
        if labels is not None:
            dropped = labels == -1
            uncond = torch.where(
                dropped[:, None], uncond, F.embedding(labels.masked_fill(dropped, 0), self.label_embed)
            )
        return uncond[:, None]

    def _check(
        self, tokens: Tensor, t: Tensor, ids_keep: Tensor | None, labels: Tensor | None, cu_seqlens: Tensor | None
    ) -> None:
        config = self.config
        lead = ["B", "K"] if cu_seqlens is None else ["T"]
        if tokens.ndim != len(lead) + 1 or tokens.shape[-1] != config.token_dim:
            raise ValueError(
                f"UViT: tokens has shape {list(tokens.shape)}, want [{', '.join(lead)}, {config.token_dim}] "
                f"(patches of {config.patch_size}x{config.patch_size} pixels, {config.channels} channels)"
            )
        num_images = tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if t.shape not in ((num_images,), (num_images, config.dim)):
            raise ValueError(
                f"UViT: t has shape {list(t.shape)}, want [{num_images}], one per image of tokens, "
                f"or [{num_images}, {config.dim}], ready time tokens"
            )
        if ids_keep is None and cu_seqlens is not None:
            raise ValueError("UViT: cu_seqlens is given without ids_keep; packed tokens have to say which they are")
        if ids_keep is None and tokens.shape[1] != config.num_tokens:
            raise ValueError(
                f"UViT: tokens has {tokens.shape[1]} patches per image and ids_keep is None, want all "
                f"{config.num_tokens}; pass ids_keep to say which ones these are"
            )
        if ids_keep is not None and ids_keep.shape != tokens.shape[:-1]:
            raise ValueError(
                f"UViT: ids_keep has shape {list(ids_keep.shape)}, want {list(tokens.shape[:-1])} as tokens"
            )
        if ids_keep is not None and config.final_conv:
            raise ValueError(
                "UViT: ids_keep was given to a model with final_conv=True, whose convolution reads across patches and "
                "needs whole images; pretrain with final_conv=False and switch it on for the unmasked stage"
            )
        if labels is not None and not config.num_classes:
            raise ValueError(
                "UViT: labels were given to a model with num_classes=0; pass None or configure num_classes"
            )
        if labels is not None and labels.shape != t.shape[:1]:
            raise ValueError(
                f"UViT: labels has shape {list(labels.shape)}, want {list(t.shape[:1])}, one per image of tokens"
            )


def _neighbours(value: int, step: int) -> str:
    """The multiples of `step` around `value`, for an error message."""
    below = value // step * step
    return f"{below} or {below + step}" if below else str(step)

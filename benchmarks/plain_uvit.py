"""The train step of `UViT` as plain PyTorch would write it, twice: as well as it can, and as the published code does.

Both have the parameters of a `UViT`, start from its values and do the same job: from uint8 images to updated weights
and their average. `Draws` may be fed in to compare losses and gradients with ours; without it they draw their own.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.tasks import compile_static
from maskdm_fast.diffusion import NoiseSchedule
from maskdm_fast.models import UViT
from maskdm_fast.models.layers import timestep_embedding
from maskdm_fast.optim import ema_decay_at
from maskdm_fast.train.config import DenoisingConfig


@dataclasses.dataclass(frozen=True)
class Draws:
    """What is random in one step: ``t [B]``, visible patches ``ids_keep [B, K]`` or None, and ``eps [B, N, P*P*C]``."""

    t: Tensor
    ids_keep: Tensor | None
    eps: Tensor


class PlainBlock(nn.Module):
    """Pre-norm block on `F.scaled_dot_product_attention`; `skip` is None, "split" (two products) or "concat"."""

    def __init__(self, dim: int, num_heads: int, hidden: int, skip: str | None):
        super().__init__()
        self.num_heads = num_heads
        if skip == "split":
            self.skip_x, self.skip_skip = nn.Linear(dim, dim), nn.Linear(dim, dim, bias=False)
        elif skip == "concat":
            self.skip = nn.Linear(2 * dim, dim)
        self.how = skip
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.how == "split":
            x = self.skip_x(x) + self.skip_skip(skip)
        elif self.how == "concat":
            x = self.skip(torch.cat((x, skip), dim=-1))
        batch, tokens, dim = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, dim))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class PlainUViT(nn.Module):
    """The network of `UViT` (unconditional) from PyTorch's own layers, with the values of `model`.

    Args:
        model: gives shape and values.
        official: embed all patches and add all positions, then drop the masked ones by boolean indexing; concatenate
            long skips. Otherwise only visible patches are touched and skips are two products.
    """

    def __init__(self, model: UViT, *, official: bool):
        super().__init__()
        self.config, self.official = model.config, official
        config, dim = model.config, model.config.dim
        hidden, half = int(dim * config.mlp_ratio), model.config.num_blocks // 2
        how = "concat" if official else "split"
        self.patch_embed = nn.Linear(config.token_dim, dim)
        self.positions = nn.Parameter(torch.empty(config.num_extras + config.num_tokens, dim))
        self.blocks = nn.ModuleList(
            PlainBlock(dim, config.num_heads, hidden, how if index > half else None)
            for index in range(config.num_blocks)
        )
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, config.token_dim)
        with torch.no_grad():
            for mine, theirs in self.pairs(model):
                mine.copy_(theirs)

    def pairs(self, model: UViT, *, grad: bool = False) -> list[tuple[Tensor, Tensor]]:
        """Our parameters (or gradients) beside those of `model`, in one order."""

        def value(parameter: Tensor) -> Tensor:
            return parameter.grad if grad else parameter

        own = [self.patch_embed.weight, self.patch_embed.bias, self.positions]
        theirs = [model.patch_embed.weight, model.patch_embed.bias, model.positions]
        for mine, other in zip(self.blocks, [*model.in_blocks, model.mid_block, *model.out_blocks], strict=True):
            if mine.how == "split":
                own += [mine.skip_x.weight, mine.skip_skip.weight, mine.skip_x.bias]
                theirs += [other.skip.weight_x, other.skip.weight_skip, other.skip.bias]
            for have, want in (
                (mine.norm1, other.norm1),
                (mine.qkv, other.attention.qkv),
                (mine.proj, other.attention.proj),
                (mine.norm2, other.norm2),
                (mine.fc1, other.mlp.fc1),
                (mine.fc2, other.mlp.fc2),
            ):
                own += list(have.parameters())
                theirs += list(want.parameters())
        own += [*self.norm.parameters(), *self.head.parameters()]
        theirs += [*model.norm.parameters(), *model.head.parameters()]
        pairs = [(value(mine), value(other)) for mine, other in zip(own, theirs, strict=True)]
        for mine, other in zip(self.blocks, [*model.in_blocks, model.mid_block, *model.out_blocks], strict=True):
            if mine.how == "concat":
                halves = [value(other.skip.weight_x), value(other.skip.weight_skip)]
                pairs += [
                    (value(mine.skip.weight), torch.cat(halves, dim=1)),
                    (value(mine.skip.bias), value(other.skip.bias)),
                ]
        return pairs

    def forward(self, tokens: Tensor, t: Tensor, visible: Tensor | None) -> Tensor:
        """`visible` is ``ids_keep [B, K]``, or for the official way ``bool [B, N]`` over the tokens of all patches."""
        extras = self.config.num_extras
        time = timestep_embedding(t, self.config.dim)[:, None]
        patches = self.patch_embed(tokens)
        if self.official:
            x = torch.cat((time, patches), dim=1) + self.positions
            if visible is not None:
                x = x[F.pad(visible, (extras, 0), value=True)].reshape(x.shape[0], -1, x.shape[2])
        else:
            rows = self.positions[extras:]
            x = torch.cat(
                (time + self.positions[:extras], patches + (rows if visible is None else F.embedding(visible, rows))),
                dim=1,
            )
        skips = []
        for block in self.blocks:
            if block.how is None:
                x = block(x)
                skips.append(x)
            else:
                if len(skips) > len(self.blocks) // 2:
                    skips.pop()  # the middle block's output is no skip
                x = block(x, skips.pop())
        return self.head(self.norm(x))[:, extras:]


class PlainStep:
    """One train step on `PlainUViT`: noise, network, loss, clip, AdamW, EMA.

    Args:
        model: gives shape and values.
        schedule: alpha and sigma.
        num_visible: K.
        settings: of the optimizer.
        official: as in `PlainUViT`; also noises whole images, and uses AdamW as it comes and one EMA update per tensor.
        compile: run network, noise and loss under torch.compile.
    """

    def __init__(
        self,
        model: UViT,
        schedule: NoiseSchedule,
        num_visible: int,
        settings: DenoisingConfig,
        *,
        official: bool = False,
        compile: bool = False,
    ):
        self.schedule, self.num_visible, self.official, self.settings = schedule, num_visible, official, settings
        self.config, self.network = model.config, PlainUViT(model, official=official)
        self.params = list(self.network.parameters())
        self.emas = [param.detach().clone() for param in self.params]
        self.optimizer = torch.optim.AdamW(
            self.params,
            settings.lr,
            settings.betas,
            weight_decay=settings.weight_decay,
            fused=None if official else True,
        )
        self.count = 0
        loss = self._official_loss if official else self._loss
        self.loss = compile_static(loss, self.params[0].device.type) if compile else loss

    def _patches(self, images: Tensor) -> Tensor:
        """uint8 ``[B, h, w, C]`` to ``[B, N, P*P*C]``, still uint8."""
        side = self.config.patch_size
        batch, height, width, channels = images.shape
        grid = images.view(batch, height // side, side, width // side, side, channels).transpose(2, 3)
        return grid.reshape(batch, -1, side * side * channels)

    def _alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.schedule.alpha_sigma(t)
        return alpha[:, None, None], sigma[:, None, None]

    def _loss(self, images: Tensor, alpha: Tensor, sigma: Tensor, t: Tensor, ids: Tensor | None, eps: Tensor | None):
        patches = self._patches(images)
        if ids is not None:
            patches = patches.gather(1, ids[:, :, None].expand(-1, -1, patches.shape[2]))
        x0 = patches.to(torch.float32) / 127.5 - 1.0
        if eps is None:
            eps = torch.randn_like(x0)
        elif ids is not None:
            eps = eps.gather(1, ids[:, :, None].expand(-1, -1, eps.shape[2]))
        return F.mse_loss(self.network(alpha * x0 + sigma * eps, t, ids), eps)

    def _official_loss(self, images, alpha, sigma, t, ids, eps):
        x0 = self._patches(images).to(torch.float32) / 127.5 - 1.0
        if eps is None:
            eps = torch.randn_like(x0)
        visible = torch.zeros(x0.shape[:2], dtype=torch.bool, device=x0.device)
        visible = visible.scatter(1, ids, True) if ids is not None else ~visible
        pred = self.network(alpha * x0 + sigma * eps, t, visible)
        target = eps[visible].reshape(pred.shape)
        return ((pred - target) ** 2).mean(dim=(1, 2)).mean()

    def draw(self, num_images: int) -> Draws:
        """Fresh draws from torch's generator; eps is drawn inside the loss."""
        device = self.params[0].device
        t = torch.randint(0, self.schedule.num_timesteps, (num_images,), device=device)
        total = self.config.num_tokens
        if self.num_visible == total:
            return Draws(t, None, None)
        order = torch.rand(num_images, total, device=device).argsort(dim=1)
        return Draws(t, order[:, : self.num_visible].sort(dim=1).values, None)

    def gradients(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        """The loss; gradients are left in the parameters."""
        draws = draws or self.draw(len(images))
        loss = self.loss(images, *self._alpha_sigma(draws.t), draws.t, draws.ids_keep, draws.eps)
        loss.backward()
        return loss.detach()

    def __call__(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        loss = self.gradients(images, draws)
        self.update()
        return loss

    def update(self) -> None:
        """Clip, AdamW and EMA, of the gradients that are in the parameters."""
        self.count += 1
        torch.nn.utils.clip_grad_norm_(self.params, self.settings.max_grad_norm, foreach=not self.official)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        rate = 1.0 - ema_decay_at(self.count, self.settings.ema_decay)
        with torch.no_grad():
            if self.official:
                for ema, param in zip(self.emas, self.params, strict=True):
                    ema.lerp_(param, rate)
            else:
                torch._foreach_lerp_(self.emas, self.params, rate)

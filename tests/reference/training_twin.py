"""SAM's training in PyTorch, with the modules of segment-anything, as a reference.

The module has two uses. `replay` computes the loss of recorded prompts for one mask at a time, and
calls only the forward functions of segment-anything. The tests compare gradients with it.
`train_step` draws its prompts itself and is written to be fast in eager PyTorch. The benchmark
compares training speed with it.

Details that the paper does not specify follow the defaults of `train.objectives.interactive`.
"""

import dataclasses
import types

import torch
from torch.nn import functional

FOCAL, DICE = 20, 1  # weights in the loss of a mask; the squared error of its IoU has weight 1
FOCAL_ALPHA = 0.25
BOX_NOISE, MAX_BOX_NOISE = 0.1, 20  # a fraction of the side, and pixels

# Labels of points, as in segment-anything's ONNX wrapper; -2 is an empty slot.
ABSENT, NOT_A_POINT, BACKGROUND, FOREGROUND, TOP_LEFT, BOTTOM_RIGHT = range(-2, 4)
FIRST_SLOTS = 2  # a click and the padding point, or a box's two corners


@dataclasses.dataclass(frozen=True)
class Batch:
    """Padded images and their masks. There are no empty slots.

    Attributes:
      image: images 'b 3 h w', float32 in 0..255.
      size: the (height, width) of each of the b images without padding.
      mask: masks 'n h w', bool.
      owner: the index of the image of each mask, 'n'.
    """

    image: torch.Tensor
    size: list[tuple[int, int]]
    mask: torch.Tensor
    owner: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Round:
    """The prompts of one round, for n masks.

    Attributes:
      points: points 'n k 2', (x, y) in pixels of the padded image.
      labels: labels of the points, 'n k'. Empty slots are last.
      mask: logits 'n lh lw' of the previous round, or None.
      multimask: whether there are three outputs.
    """

    points: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor | None
    multimask: bool


def replay(model, batch, rounds):
    """Returns the loss of recorded prompts, and the logits 'round n lh lw' for the next rounds."""
    embedding = model.image_encoder(normalize(model, batch))
    target = to_loss_size(model, batch.mask)
    losses, chosen = [], []
    for prompts in rounds:
        outputs = [
            decode_one(model, embedding[owner, None], prompts, i)
            for i, owner in enumerate(batch.owner)
        ]
        logits, iou = (torch.cat(x) for x in zip(*outputs, strict=True))
        losses.append(round_loss(logits, iou, target).mean())
        chosen.append(most_confident(logits, iou))
    return torch.stack(losses).mean(), torch.stack(chosen)


def decode_one(model, embedding, prompts, i):
    """Returns the masks '1 m lh lw' and IoUs '1 m' for the prompts of mask i."""
    points, labels = prompts.points[i], prompts.labels[i]
    is_click, is_corner = (labels == 0) | (labels == 1), labels >= TOP_LEFT
    clicks = (points[is_click][None], labels[is_click][None]) if is_click.any() else None
    box = points[is_corner].reshape(1, 4) if is_corner.any() else None
    mask = None if prompts.mask is None else prompts.mask[i, None, None]
    sparse, dense = model.prompt_encoder(points=clicks, boxes=box, masks=mask)
    return model.mask_decoder(
        image_embeddings=embedding,
        image_pe=model.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=prompts.multimask,
    )


def make_optimizer(model, config, fused=True):
    """Returns AdamW with the settings of a `train.config.Optimizer`.

    Each learning rate and weight decay has a parameter group.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        path, _, kind = name.rpartition(".")
        is_kernel = isinstance(model.get_submodule(path), LAYERS) and kind == "weight"
        key = rate_of(name, config.layer_decay, len(model.image_encoder.blocks)), is_kernel
        groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "rate": rate,
                "weight_decay": config.weight_decay if is_kernel else 0.0,
            }
            for (rate, is_kernel), parameters in groups.items()
        ],
        betas=(config.b1, config.b2),
        fused=fused,
    )


LAYERS = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.ConvTranspose2d)


def rate_of(name, layer_decay, depth):
    """Returns the ratio of the learning rate of a parameter to that of the decoder."""
    parts = name.split(".")
    if parts[0] != "image_encoder" or parts[1] == "neck":
        return 1.0
    block = int(parts[2]) if parts[1] == "blocks" else -1
    return layer_decay ** (depth - block)


def set_rates(optimizer, config, step):
    """Sets the learning rates for a step: linear warm-up, then a decay at each boundary."""
    rate = config.peak_lr * min(1, (step + 1) / config.warmup_steps)
    rate *= config.lr_decay_factor ** sum(step >= drop for drop in config.lr_boundaries)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate"]


def use_native(model):
    """Replaces attention and norms of segment-anything by the faster functions of PyTorch."""
    for module in model.modules():
        kind = f"{type(module).__module__}.{type(module).__name__}"
        if kind.endswith("transformer.Attention"):
            module.forward = types.MethodType(native_attention, module)
        elif kind.endswith("LayerNorm2d"):
            module.forward = types.MethodType(native_norm, module)
    return model


def native_attention(self, q, k, v):
    pairs = (self.q_proj, q), (self.k_proj, k), (self.v_proj, v)
    q, k, v = (self._separate_heads(project(x), self.num_heads) for project, x in pairs)
    out = functional.scaled_dot_product_attention(q, k, v)
    return self.out_proj(self._recombine_heads(out))


def native_norm(self, x):
    x = functional.layer_norm(
        x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, self.eps
    )
    return x.permute(0, 3, 1, 2)


def train_step(model, optimizer, batch, num_clicks, num_extra_rounds, generator):
    """Draws prompts, takes one optimizer step and returns the loss."""
    optimizer.zero_grad()
    loss, _ = backward(model, batch, num_clicks, num_extra_rounds, generator)
    optimizer.step()
    return loss


def backward(model, batch, num_clicks, num_extra_rounds, generator):
    """Accumulates gradients of the parameters, and returns the loss and its `Round`s.

    No gradient flows between rounds. Each round therefore runs its backward pass to the embedding
    at once. This is as fast as a single backward pass, and memory does not grow with the rounds.
    """
    embedding = model.image_encoder(normalize(model, batch))
    leaf = embedding.detach().requires_grad_()
    target = to_loss_size(model, batch.mask)
    inside = is_inside(model, batch, target)
    points, labels = first_prompts(batch, num_clicks, generator)
    count = torch.zeros(len(points), dtype=torch.long)
    num_rounds = 1 + num_clicks + num_extra_rounds
    without_click = torch.randint(1, num_clicks + 1, count.shape, generator=generator)
    previous, total, rounds = None, 0.0, []
    for index in range(num_rounds):
        has_click = torch.full(count.shape, 0 < index < num_rounds - min(num_extra_rounds, 1))
        if num_extra_rounds == 2:
            has_click &= without_click != index
        if has_click.any():
            click, label = sample_click_on_error(model, previous, target, inside, generator)
            slot = (has_click.nonzero()[:, 0], FIRST_SLOTS + count[has_click])
            points, labels = points.clone(), labels.clone()
            points[slot], labels[slot] = click[has_click], label[has_click]
            count = count + has_click
        rounds.append(Round(points, labels, previous, multimask=index == 0))
        logits, iou = decode(model, leaf, batch.owner, rounds[-1], count)
        loss = round_loss(logits, iou, target).mean() / num_rounds
        loss.backward()
        total += loss.item()
        previous = most_confident(logits, iou)
    embedding.backward(leaf.grad)
    return total, rounds


def decode(model, embedding, owner, prompts, count):
    """Returns the masks 'n m lh lw' and IoUs 'n m', batched by the number of clicks."""
    order, outputs = [], []
    for clicks in count.unique().tolist():
        rows = (count == clicks).nonzero()[:, 0]
        slots = slice(FIRST_SLOTS + clicks)
        group = Round(
            points=prompts.points[rows, slots],
            labels=prompts.labels[rows, slots],
            mask=None if prompts.mask is None else prompts.mask[rows],
            multimask=prompts.multimask,
        )
        order.append(rows)
        outputs.append(decode_without_empty_slots(model, embedding[owner[rows]], group))
    if len(outputs) == 1:
        return outputs[0]
    inverse = torch.cat(order).argsort()
    return tuple(torch.cat(parts)[inverse] for parts in zip(*outputs, strict=True))


def decode_without_empty_slots(model, image, prompts):
    """Decodes prompts without empty slots. `image` has the embedding for each mask."""
    encoder, decoder = model.prompt_encoder, model.mask_decoder
    outputs = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    sparse = encode_points(encoder, prompts.points, prompts.labels)
    tokens = torch.cat([outputs.expand(len(sparse), -1, -1), sparse], dim=1)
    if prompts.mask is None:
        image = image + encoder.no_mask_embed.weight[..., None, None]
    else:
        image = image + encoder.mask_downscaling(prompts.mask[:, None])
    shape = image.shape
    tokens, image = decoder.transformer(image, encoder.get_dense_pe(), tokens)
    image = decoder.output_upscaling(image.transpose(1, 2).view(shape))
    selected = [1, 2, 3] if prompts.multimask else [0]
    hypernetwork_out = [decoder.output_hypernetworks_mlps[m](tokens[:, 1 + m]) for m in selected]
    logits = torch.stack(hypernetwork_out, dim=1) @ image.flatten(2)
    iou = decoder.iou_prediction_head(tokens[:, 0])
    return logits.unflatten(2, image.shape[2:]), iou[:, selected]


def encode_points(encoder, points, labels):
    """Returns tokens of points and box corners."""
    table = [encoder.not_a_point_embed, *encoder.point_embeddings]
    table = torch.cat([embedding.weight for embedding in table])
    positions = encoder.pe_layer.forward_with_coords(points + 0.5, encoder.input_image_size)
    positions = positions.masked_fill((labels == NOT_A_POINT)[..., None], 0)
    return positions + table[labels + 1]


def first_prompts(batch, num_clicks, generator):
    """Returns points and labels: a click or a noisy box for each mask, and slots for clicks."""
    n, height, width = batch.mask.shape
    is_box = torch.rand((n, 1), generator=generator) < 0.5
    click = draw_pixel(batch.mask, generator)
    click = torch.stack([click, torch.zeros_like(click)], dim=1)
    rows, columns = batch.mask.any(2).float(), batch.mask.any(1).float()
    first = torch.stack([columns.argmax(1), rows.argmax(1)], dim=1).float()
    last_x, last_y = width - 1 - columns.flip(1).argmax(1), height - 1 - rows.flip(1).argmax(1)
    box = torch.stack([first, torch.stack([last_x, last_y], dim=1).float()], dim=1)
    noise = torch.randn(box.shape, generator=generator) * BOX_NOISE * (box[:, 1:] - box[:, :1])
    box = box + noise.clamp(-MAX_BOX_NOISE, MAX_BOX_NOISE)
    limit = torch.tensor(batch.size, dtype=torch.float32)[batch.owner].flip(1)[:, None] - 1
    box = torch.minimum(box.clamp(min=0), limit).sort(dim=1).values
    points = torch.where(is_box[..., None], box, click)
    corners, padded = (TOP_LEFT, BOTTOM_RIGHT), (FOREGROUND, NOT_A_POINT)
    labels = torch.where(is_box, torch.tensor(corners), torch.tensor(padded))
    return (
        functional.pad(points, (0, 0, 0, num_clicks)),
        functional.pad(labels, (0, num_clicks), value=ABSENT),
    )


def sample_click_on_error(model, logits, target, inside, generator):
    """Returns a wrongly predicted pixel for each mask, as a point of the image, and its label."""
    background = ~target & inside
    wrong = ((logits > 0) != target) & inside
    is_right = ~wrong.flatten(1).any(1)
    if is_right.any():
        wrong[is_right] = background[is_right]
        is_full = is_right & ~background.flatten(1).any(1)
        wrong[is_full] = target[is_full]
    pixel = draw_pixel(wrong, generator)
    x, y = pixel.long().unbind(1)
    label = target[torch.arange(len(target)), y, x].long()
    return (pixel + 0.5) * loss_stride(model) - 0.5, label


def draw_pixel(region, generator):
    """Returns a uniformly sampled pixel (x, y), float32, of each region 'n h w'."""
    noise = torch.rand(region.shape, generator=generator).masked_fill_(~region, -1)
    place = noise.flatten(1).argmax(1)
    width = region.shape[2]
    return torch.stack([place % width, place // width], dim=1).float()


def normalize(model, batch):
    """Returns normalized images with zeros in the padding."""
    image = (batch.image - model.pixel_mean) / model.pixel_std
    for pixels, (height, width) in zip(image, batch.size, strict=True):
        pixels[:, height:] = 0
        pixels[:, :, width:] = 0
    return image


def to_loss_size(model, mask):
    """Returns the targets 'n lh lw': the pixels that a mask covers by at least half.

    If there is no such pixel, the target has all pixels that the mask covers in part.
    """
    fraction = functional.avg_pool2d(mask.float(), loss_stride(model))
    target = fraction >= 0.5
    vanished = ~target.flatten(1).any(1)
    return target | (vanished[:, None, None] & (fraction > 0))


def is_inside(model, batch, target):
    """Returns the pixels 'n lh lw' for clicks: those with centers in the image, and targets."""
    inside, cell = torch.zeros_like(target), loss_stride(model)
    for region, owner in zip(inside, batch.owner.tolist(), strict=True):
        height, width = ((2 * side + cell) // (2 * cell) for side in batch.size[owner])
        region[:height, :width] = True
    return inside | target


def loss_stride(model):
    """Returns the number of image pixels per pixel of the decoder, along a side."""
    return model.image_encoder.img_size // model.prompt_encoder.mask_input_size[0]


def round_loss(logits, iou, target):
    """Returns the loss 'n' of the best of the outputs 'n m h w' with predicted IoUs 'n m'."""
    mask_loss = FOCAL * focal_loss(logits, target[:, None]) + DICE * dice_loss(
        logits, target[:, None]
    )
    best = mask_loss.argmin(1, keepdim=True)
    iou_loss = (iou - mask_iou(logits, target[:, None])) ** 2
    return (mask_loss + iou_loss).gather(1, best)[:, 0]


def focal_loss(logits, target):
    """Computes the focal loss like torchvision's `sigmoid_focal_loss`, averaged over pixels."""
    target = target.float().expand_as(logits)
    p = logits.sigmoid()
    p_t = p * target + (1 - p) * (1 - target)
    alpha = FOCAL_ALPHA * target + (1 - FOCAL_ALPHA) * (1 - target)
    cross_entropy = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (alpha * (1 - p_t) ** 2 * cross_entropy).mean((2, 3))


def dice_loss(logits, target):
    p, target = logits.sigmoid(), target.float()
    overlap, total = (p * target).sum((2, 3)), p.sum((2, 3)) + target.sum((2, 3))
    return 1 - (2 * overlap + 1) / (total + 1)


@torch.no_grad()
def mask_iou(logits, target):
    predicted = logits > 0
    union = (predicted | target).sum((2, 3))
    return (predicted & target).sum((2, 3)) / union.clamp(min=1)


def most_confident(logits, iou):
    """Returns the logits 'n lh lw' of the output with the highest predicted IoU."""
    best = iou.argmax(1)
    return logits.detach()[torch.arange(len(best)), best]

"""The model on packed documents: one forward for every rank, micro-step and content.

Under ZeRO-3 all ranks must enter the same modules in the same order, forward and backward. So the
vision tower runs exactly once, images or not, and its features always enter the embeddings: adding
`0 * features.sum()` to the loss alone would let a rank without images skip the language model's
backward when that is frozen, and the others would wait forever.
"""

from typing import Any

from torch import Tensor, nn

from data_tools.stream.collate import Batch, ModelLayout
from train.modeling.loss import LossOutput, weighted_cross_entropy
from train.modeling.pixels import PixelNormalizer, patchify


class PackedModel(nn.Module):
    """Wraps a `Qwen2_5_VLForConditionalGeneration` (as `.model`); maps a Batch to its loss."""

    def __init__(self, model: Any, normalizer: PixelNormalizer) -> None:
        super().__init__()
        self.model = model
        self.normalizer = normalizer

    def forward(self, batch: Batch) -> LossOutput:
        """Return the weighted loss sum of a batch on this device."""
        return weighted_cross_entropy(self.logits(batch), batch.targets, batch.weights)

    def logits(self, batch: Batch) -> Tensor:
        """Return the (L, vocabulary) logits at the label positions only."""
        hidden = self.model.model.language_model(
            inputs_embeds=self._embeddings(batch),
            position_ids=batch.position_ids,
            use_cache=False,  # a cache would switch the separation of documents off
            cu_seq_lens_q=batch.cu_seqlens,
            cu_seq_lens_k=batch.cu_seqlens,
            max_length_q=batch.max_seqlen,
            max_length_k=batch.max_seqlen,
        ).last_hidden_state
        return self.model.lm_head(hidden[0, batch.target_index])

    def _embeddings(self, batch: Batch) -> Tensor:
        """Return (1, T, hidden) embeddings with the image features in the places of the pads."""
        embeddings = self.model.get_input_embeddings()(batch.input_ids)
        features = self._image_features(batch).to(embeddings.dtype)
        if batch.num_dummy_images:
            return embeddings + 0.0 * features.sum()
        # index_copy: the backward of a masked scatter would ask the device for a count.
        return embeddings[0].index_copy(0, batch.image_index, features)[None]

    def _image_features(self, batch: Batch) -> Tensor:
        """Return (P / 4, hidden) features of all images, in reading order."""
        visual = self.model.model.visual
        pixels = patchify(batch.pixels, batch.grid_thw, self.normalizer)
        return visual(
            pixels.to(visual.dtype),
            grid_thw=batch.grid_thw,
            cu_seqlens=batch.vision_cu_seqlens,
            max_seqlen=batch.vision_max_seqlen,
            window_index=batch.vision_window_index,
            cu_window_seqlens=batch.vision_cu_window_seqlens,
            max_window_seqlen=batch.vision_max_window_seqlen,
            position_ids=batch.vision_position_ids,
        ).pooler_output


def layout_of(config: Any) -> ModelLayout:
    """Return what the data path must know of a model's config."""
    text = config.text_config
    pad = next(
        i for i in (text.pad_token_id, text.eos_token_id, text.bos_token_id) if i is not None
    )
    return ModelLayout(
        image_pad_id=config.image_token_id,
        pad_id=pad if isinstance(pad, int) else pad[0],
        window_px=config.vision_config.window_size,
    )

"""Multimodal models whose published files nobody here has seen: tiny ones, under the names that transformers saves.

transformers undoes its own conversions when it saves, which leads back to the names of the checkpoints that it reads.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from architectures import EXPERTS, tiny_config
from transformers import CONFIG_MAPPING


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedModel:
    """A tiny multimodal model.

    Attributes:
        model_type: That of the whole.
        text_type: That of its language model, whose tiny config the conformance tests have.
        class_name: Its class in transformers.
        parts: Configs of its other parts, and keys of its own.
    """

    model_type: str
    text_type: str
    class_name: str
    parts: Mapping[str, Any]

    @property
    def name(self) -> str:
        """What tests call it."""
        return self.model_type

    @property
    def experts(self) -> int:
        """Experts of each layer."""
        return EXPERTS

    def write_tiny(self, folder: Path) -> Path:
        """Writes the model with random weights into an empty folder."""
        text = tiny_config(self.text_type).to_dict()
        config = CONFIG_MAPPING[self.model_type](text_config=text, **self.parts)
        torch.manual_seed(0)
        model = getattr(transformers, self.class_name)(config).float()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.15)
        model.save_pretrained(folder, max_shard_size="60KB")
        return folder


IDS = {"image_token_id": 61, "video_token_id": 62}
VISION = {"hidden_size": 16, "num_attention_heads": 2, "patch_size": 4}

MODELS = (
    SavedModel(
        model_type="inkling_mm_model",
        text_type="inkling_text",
        class_name="InklingForConditionalGeneration",
        parts={
            "audio_bos_token_id": 61,
            "audio_config": {"mel_vocab_size": 16, "n_mel_bins": 8, "text_hidden_size": 32},
            "audio_token_id": 62,
            "image_bos_token_id": 63,
            "image_token_id": 60,
            "vision_config": VISION | {"n_layers": 2, "text_hidden_size": 32},
        },
    ),
    SavedModel(
        model_type="inkling2",
        text_type="inkling2_text",
        class_name="Inkling2ForConditionalGeneration",
        parts={
            "vision_config": VISION
            | {"num_hidden_layers": 2, "posemb_grid_size": 4, "projection_hidden_dim": 24, "text_hidden_size": 32}
        },
    ),
    SavedModel(
        model_type="qwen4_exp",
        text_type="qwen4_exp_text",
        class_name="Qwen4ExpForConditionalGeneration",
        parts={
            **IDS,
            "vision_config": {
                "depth": 2,
                "hidden_size": 16,
                "intermediate_size": 20,
                "num_heads": 2,
                "num_position_embeddings": 16,
                "out_hidden_size": 32,
                "patch_size": 4,
            },
            "vision_end_token_id": 59,
            "vision_start_token_id": 60,
        },
    ),
    SavedModel(
        model_type="dots3_note",
        text_type="dots3_note_text",
        class_name="Dots3NoteForConditionalGeneration",
        parts={
            **IDS,
            "audio_config": {
                "adapter_input_size": 16,
                "adapter_out_dim": 32,
                "downsample_hidden_size": 8,
                "feature_size": 16,
                "hidden_size": 16,
                "intermediate_size": 20,
                "num_attention_heads": 2,
                "num_hidden_layers": 2,
            },
            "audio_token_id": 63,
            "vision_config": VISION
            | {
                "adapter_in_dim": 16,
                "adapter_out_dim": 32,
                "intermediate_size": 20,
                "mlp_layer_types": ["dense", "sparse"],
                "moe_intermediate_size": 12,
                "num_experts_per_tok": 2,
                "num_hidden_layers": 2,
                "num_local_experts": 4,
            },
        },
    ),
)

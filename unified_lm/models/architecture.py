"""Checks and changes of a model's configuration: text decoders only, of the expected family, with the recipe's dropout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from unified_lm.config.schema import ModelConfig
from unified_lm.core.errors import ModelError, UserError
from unified_lm.models.families import OWN_FAMILIES

_ENCODERS = frozenset(
    {
        "albert",
        "bert",
        "big_bird",
        "camembert",
        "data2vec-text",
        "deberta",
        "deberta-v2",
        "distilbert",
        "electra",
        "ernie",
        "eurobert",
        "megatron-bert",
        "modernbert",
        "mpnet",
        "rembert",
        "roberta",
        "roberta-prelayernorm",
        "roc_bert",
        "roformer",
        "xlm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xlnet",
        "xmod",
    }
)
"""`model_type`s of encoders; transformers can load some of them as causal language models, which they were not trained as."""

_DROPOUT_KEYS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
_MOST_LAYERS = 2000
"""Building more of them, even without storage, takes minutes; no published model has a tenth."""
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Under which names families have their number of layers."""


def described_config(model: ModelConfig) -> PreTrainedConfig:
    """The configuration that `model.architecture` describes.

    Raises:
        ModelError: the values describe no model of the family, or one of senseless depth.
    """
    # Looked at first: families write a list with an entry for each layer into their configurations.
    depths = [value for name in _DEPTHS if isinstance(value := model.architecture.get(name), int | float)]
    if any(depth > _MOST_LAYERS for depth in depths):
        raise ModelError(f"model.architecture: got {max(depths)} layers, expected at most {_MOST_LAYERS}.")
    with blaming_architecture(model):
        return AutoConfig.for_model(model.family, **model.architecture)


def check_architecture(hf_config: PreTrainedConfig, family: str, name: str) -> None:
    """Refuse models that are not text decoders, or not of the expected family.

    Args:
        hf_config: the configuration as loaded.
        family: the expected `model_type`; empty accepts any.
        name: of the model, for the error text.

    Raises:
        ModelError: an encoder-decoder, an encoder, a multimodal model, another family, or one transformers cannot build.
    """
    kind = hf_config.model_type
    classes = ", ".join(hf_config.architectures or ()) or "no architecture named"
    if getattr(hf_config, "is_encoder_decoder", False):
        raise ModelError(f"'{name}' is an encoder-decoder model ({kind}: {classes}). A decoder-only language model is needed.")
    if kind in _ENCODERS:
        raise ModelError(f"'{name}' is an encoder ({kind}: {classes}): it cannot generate. A decoder-only model is needed.")
    if getattr(hf_config, "vision_config", None) is not None or getattr(hf_config, "audio_config", None) is not None:
        raise ModelError(f"'{name}' is a multimodal model ({kind}: {classes}). Use its text-only checkpoint.")
    if family and kind != family:
        raise ModelError(
            f"'{name}' is a model of family '{kind}', but the recipe expects model.family={family}. Use a model of that "
            f"family, or set model.family={kind} (its other settings may not fit)."
        )
    known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *OWN_FAMILIES}
    if kind not in known and not getattr(hf_config, "auto_map", None):
        raise ModelError(f"'{name}' ({kind}: {classes}) has no causal language model in transformers.")


def dropout_keys(hf_config: PreTrainedConfig) -> list[str]:
    """The names under which the configuration holds its attention dropout; empty where the family has none."""
    return [key for key in _DROPOUT_KEYS if hasattr(hf_config, key)]


def override_dropout(hf_config: PreTrainedConfig, probability: float | None) -> dict[str, float]:
    """Write the recipe's attention dropout into the configuration.

    Args:
        hf_config: changed in place.
        probability: of dropping an attention weight; None changes nothing.

    Returns:
        Name of each changed key -> the checkpoint's own value, which an export must have again; empty if nothing was changed.

    Raises:
        ModelError: the family has no attention dropout.
    """
    if probability is None:
        return {}
    keys = dropout_keys(hf_config)
    if not keys:
        raise ModelError(
            f"model.attention_dropout={probability}, but family '{hf_config.model_type}' has no attention dropout. "
            "Set model.attention_dropout=null."
        )
    own = {key: float(getattr(hf_config, key)) for key in keys}
    for key in keys:
        setattr(hf_config, key, probability)
    return own


@contextmanager
def blaming_architecture(model: ModelConfig) -> Iterator[None]:
    """Turn whatever transformers and torch run into with the values of `model.architecture` into an error that names them.

    Raises:
        ModelError: the values describe no model.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if model.family not in CONFIG_MAPPING:
            raise ModelError(f"model.family: transformers knows no family '{model.family}'.") from error
        said = " ".join(str(error).split())
        raise ModelError(
            f"model.architecture: these values describe no {model.family} model ({type(error).__name__}: {said[:300]}). "
            "Compare them with the config.json of a model of that family."
        ) from error

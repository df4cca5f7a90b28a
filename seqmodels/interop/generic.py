"""Fields that a config of any family may have in transformers 4 and 5, beside those of its own class.

`architectures` and `auto_map` are notes: the names of the tensors show what a file holds, and transformers takes its
own class unless it is told to trust code from the file.
"""

from collections.abc import Mapping
from typing import Any

from seqmodels import pattern
from seqmodels.interop.table import Honoured, Table, flag, harmless, integer, only, positive, refuse

GENERATION = (
    *("assistant_confidence_threshold", "assistant_lookbehind", "bad_words_ids", "begin_suppress_tokens"),
    *("diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size"),
    *("encoder_repetition_penalty", "epsilon_cutoff", "eta_cutoff", "exponential_decay_length_penalty"),
    *("forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_length", "max_new_tokens"),
    *("min_length", "no_repeat_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule"),
    *("num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "remove_invalid_values"),
    *("repetition_penalty", "return_dict_in_generate", "suppress_tokens", "target_lookbehind", "temperature"),
    *("top_k", "top_p", "typical_p"),
)

FRESH = "for fresh weights"
TRAINING = "for training"
ROUNDING = "changes the rounding only"

COMMON: Table = {
    **harmless(
        "a note",
        *("architectures", "auto_map", "custom_pipelines", "model_type", "name_or_path", "transformers_version"),
        *("_commit_hash", "_from_model_config", "_name_or_path", "is_llama_config", "transformers.js_config"),
        *("unsloth_fixed", "unsloth_version"),
    ),
    **harmless("for generation", *GENERATION, "is_decoder", "is_encoder_decoder", "prefix", "task_specific_params"),
    **harmless("for the tokenizer", "max_sequence_length", "model_max_length", "tokenizer_class"),
    **harmless(
        "id of a special token",
        *("bos_token_id", "cls_token_id", "decoder_start_token_id", "eos_token_id", "mask_token_id", "pad_token_id"),
        *("sep_token_id", "unk_token_id"),
    ),
    **harmless("for other heads", "finetuning_task", "id2label", "label2id", "num_labels", "problem_type"),
    **harmless(
        "what a call returns beside the logits",
        *("output_attentions", "output_hidden_states", "return_dict", "torchscript", "use_cache", "use_return_dict"),
    ),
    **harmless(ROUNDING, "dtype", "torch_dtype", "use_bfloat16"),
    **harmless(
        "another implementation of the same function",
        *("_attn_implementation", "_attn_implementation_autoset", "_flash_attn_2_enabled", "attn_implementation"),
        *("experts_implementation", "gradient_checkpointing", "use_flash_attention", "use_flash_attn"),
    ),
    **harmless(
        "read by none of these models",
        *("add_cross_attention", "chunk_size_feed_forward", "cross_attention_hidden_size", "tf_legacy_loss"),
        "tie_encoder_decoder",
    ),
    **harmless(FRESH, "initializer_range"),
    **harmless(TRAINING, "hidden_dropout_prob", "attention_probs_dropout_prob", "neftune_noise_alpha"),
    **harmless(
        "names the file with the weights, which seqmodels.interop.pretrained.load reads", "transformers_weights"
    ),
    "compression_config": only(None),
    "configuration_files": only(None),
    "fusion_config": only(None),
    "per_layer_config": only(None, {}),
    "pruned_heads": only(None, {}),
    "quantization": only(None),
    "quantization_config": only(None),
}


def sizes(vocab_size: int, width: int, layers: int, tied: bool) -> dict[str, Honoured]:
    """The sizes that every family has, with its defaults."""
    return {
        "vocab_size": Honoured(vocab_size, integer()),
        "hidden_size": Honoured(width, integer()),
        "num_hidden_layers": Honoured(layers, integer()),
        "tie_word_embeddings": Honoured(tied, flag),
    }


def check_layers(theirs: Mapping[str, Any]) -> None:
    """Raise a UserError for more layers than a model of ours can have, before a list of them is made."""
    if theirs["num_hidden_layers"] > pattern.MOST_BLOCKS:
        refuse("num_hidden_layers", theirs["num_hidden_layers"], f"allowed: at most {pattern.MOST_BLOCKS}")


def repeated(blocks: list[str]) -> tuple[str, int]:
    """model.pattern and model.repeats of these blocks: the shortest group of them that is repeated."""
    layers = len(blocks)
    sizes = (size for size in range(1, layers + 1) if layers % size == 0)
    size = next(size for size in sizes if blocks == blocks[:size] * (layers // size))
    return " ".join(blocks[:size]), layers // size


def mamba_fields(vocab_size: int, width: int, layers: int, tied: bool) -> Table:
    """Fields that Mamba, FalconMamba and Mamba-2 share, with a family's defaults of `sizes`."""
    return {
        **COMMON,
        **sizes(vocab_size, width, layers, tied),
        "expand": Honoured(2, integer()),
        "conv_kernel": Honoured(4, integer(2, 8)),
        "layer_norm_epsilon": Honoured(1e-5, positive),
        "hidden_act": only("silu", "swish"),
        "use_bias": only(False),
        "use_conv_bias": only(True),
        **harmless(
            FRESH,
            *("rescale_prenorm_residual", "time_step_floor", "time_step_init_scheme", "time_step_max"),
            *("time_step_min", "time_step_scale"),
        ),
        **harmless(ROUNDING, "residual_in_fp32"),
        **harmless("left over from the config of Mamba's authors", "d_inner", "d_model", "fused_add_norm", "n_layer"),
        **harmless("left over from the config of Mamba's authors", "pad_vocab_size_multiple", "rms_norm", "ssm_cfg"),
    }

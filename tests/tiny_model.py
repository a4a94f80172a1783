"""A random two-layer Llama with a real tokenizer and a ChatML template with tools, in the shape of a prepared base model."""

from pathlib import Path

CONTEXT_LENGTH = 512

CHAT_TEMPLATE = """\
{%- set default_system = 'You are a helpful AI assistant named Tiny.' %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system, rest = messages[0]['content'], messages[1:] %}
{%- else %}
    {%- set system, rest = default_system, messages %}
{%- endif %}
{{- '<|im_start|>system\\n' + system }}
{%- if tools %}
    {{- '\\n\\nTools:' }}
    {%- for tool in tools %}
        {{- '\\n' }}{{ tool | tojson }}
    {%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for message in rest %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] }}
    {%- for call in message['tool_calls'] or [] %}
        {{- '<tool_call>' }}{{ call['function'] | tojson }}{{ '</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

CORPUS = (
    "You are a helpful AI assistant. Please answer the question: what is the capital of the country? Here is an example of a good response.",
    "Use the following information to continue from the tool result above, then give a response of your own to the question.",
    "The support desk opens at nine in the morning, and closes at six in the evening; red lamp, blue lamp, green lamp 0123456789.",
    "Once upon a time there was a small model which had learned many things; every new skill was added without losing those it knew before.",
    "When should customers expect their parcel? Usually within three working days, although larger orders might take longer during December.",
    '{"name": "get_weather", "arguments": {"city": "Paris"}} [1, 2, 3] true false null',
)


def build_tiny_model(directory: Path) -> Path:
    """Write the model and return its directory: vocabulary 512, hidden size 64, 2 layers, 4 heads (2 of keys), context 512.

    Two ids end an answer: <|im_end|> and <|endoftext|>. The weights are random but the same every time, spread widely
    enough that distributions are far from uniform.
    """
    import torch  # here, so that tests which need no model never import it
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special_tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=512, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False))
    if tokenizer.get_vocab_size() != 512:
        raise ValueError("every id that the model can sample needs a token: give the tokenizer a longer corpus")
    wrapped = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>", unk_token="<|endoftext|>"
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.model_max_length = CONTEXT_LENGTH

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=[2, 0], pad_token_id=2)  # type: ignore[no-untyped-call]
    model.save_pretrained(directory)
    wrapped.save_pretrained(directory)
    (directory / "prepared.json").write_text("{}")
    return directory

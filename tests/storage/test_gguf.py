"""A model file is accepted, or refused in one clear sentence: nothing else ever happens."""

from __future__ import annotations

import hashlib
import os
import re
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling.errors import ModelFileError
from scheduling.modelsize import ModelShape
from storage.ggmltypes import FILE_TYPES
from storage.gguf import GgufInfo, check_gguf, fingerprint
from tests.storage.malformed import Draft, Pair, model_tensors, part, text, texts

Tune = Callable[[gguf.GGUFWriter], None]


def make_model(
    path: Path,
    tune: Tune | None = None,
    tensors: int = 3,
    kv_heads: int | list[int] = 2,
    first: int = 0,
    vocabulary: bool = True,
) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_block_count(3)
    writer.add_head_count(4)
    writer.add_head_count_kv(kv_heads)
    if vocabulary:
        writer.add_token_list(["a", "b", "c", "é"])
        writer.add_token_scores([0.0, 1.0, 2.0, 3.0])
    if tune is not None:
        tune(writer)
    for number in range(first, first + tensors):
        writer.add_tensor(f"blk.{number}.weight", np.ones((3, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def model_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make_model(tmp_path_factory.mktemp("model") / "m.gguf").read_bytes()


def refusal(path: Path) -> str:
    with pytest.raises(ModelFileError) as caught:
        check_gguf(path)
    text = str(caught.value)
    assert str(path) in text or path.stem in text
    assert "\n" not in text
    return text


def test_a_model_is_described(tmp_path: Path) -> None:
    path = make_model(tmp_path / "m.gguf", lambda writer: writer.add_chat_template("{{ messages }}"))
    assert check_gguf(path) == GgufInfo(
        path=path,
        parts=(path,),
        file_bytes=path.stat().st_size,
        architecture="llama",
        name="Tiny",
        context_tokens=512,
        embedding_length=64,
        blocks=3,
        heads=4,
        kv_heads=2,
        vocab_tokens=4,
        chat_template=True,
        tensors=3,
        parameters=3 * 3 * 64,
        kv_bytes_per_token=2 * 3 * 2 * (16 + 16),
        shape=ModelShape(
            layer_bytes=(768, 768, 768),
            input_bytes=0,
            output_bytes=0,
            tied=True,
            cache_values=((32, 32),) * 3,
            cache_known=True,
            width=64,
            feed_forward=256,
            heads=4,
            key_length=16,
            value_length=16,
            vocab_tokens=4,
            train_ctx_tokens=512,
        ),
        tensor_shapes={f"blk.{number}.weight": (64, 3) for number in range(3)},
        chat_template_sha256=hashlib.sha256(b"{{ messages }}").hexdigest(),
    )


def test_what_a_store_records_of_a_model_is_told(tmp_path: Path) -> None:
    template = "{{ é }}" * 200_000

    def tune(writer: gguf.GGUFWriter) -> None:
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("llama-bpe")
        writer.add_license("apache-2.0")
        writer.add_chat_template(template)

    info = check_gguf(make_model(tmp_path / "m.gguf", tune))
    assert (info.quantization, info.tokenizer, info.tokenizer_pre) == ("Q4_K_M", "gpt2", "llama-bpe")
    assert info.license == "apache-2.0"
    assert info.chat_template_sha256 == hashlib.sha256(template.encode()).hexdigest()
    plain = check_gguf(make_model(tmp_path / "plain.gguf"))
    assert (plain.quantization, plain.tokenizer, plain.tokenizer_pre) == (None, None, None)
    assert (plain.license, plain.chat_template_sha256) == (None, None)


def test_file_types_are_called_what_their_makers_call_them(tmp_path: Path) -> None:
    for kind in gguf.LlamaFileType:
        if kind != gguf.LlamaFileType.GUESSED:
            assert FILE_TYPES[int(kind)] == kind.name.removeprefix("MOSTLY_").removeprefix("ALL_")
    info = check_gguf(make_model(tmp_path / "m.gguf", lambda writer: writer.add_file_type(999)))
    assert info.quantization == "type 999"


@pytest.mark.parametrize(
    ("tune", "said"),
    [
        (lambda writer: writer.add_int32("llama.expert_used_count", -1), "its llama.expert_used_count is -1"),
        (lambda writer: writer.add_uint64("llama.vocab_size", 1 << 40), "its llama.vocab_size is 1099511627776"),
        (lambda writer: writer.add_array("llama.feed_forward_length", [5, -6]), "its llama.feed_forward_length is -6"),
        (lambda writer: writer.add_array("tokenizer.ggml.token_type", [1, 2]), "token_type has 2 entries for 4"),
        (lambda writer: writer.add_array("tokenizer.ggml.merges", [1, 2]), "tokenizer.ggml.merges is no list"),
        (lambda writer: writer.add_string("tokenizer.ggml.token_type", "x"), "tokenizer.ggml.token_type is no list"),
    ],
)
def test_what_llama_cpp_would_index_or_hold_wrongly_is_said(tmp_path: Path, tune: Tune, said: str) -> None:
    # A vocabulary's size is asked for only where no list of tokens is there.
    path = make_model(tmp_path / "m.gguf", tune, vocabulary="vocab_size" not in said)
    assert said in refusal(path)


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ([b"a", b"b", b"c", b"b"], "tokens 1 and 3 of its tokenizer.ggml.tokens are the same"),
        # To llama.cpp a token ends at a zero byte, and an empty one is named by its number.
        ([b"a", b"b", b"a\0c"], "tokens 0 and 2"),
        ([b"a", b"", b"[EMPTY_1]"], "tokens 1 and 2"),
        ([b"a", b"x" * 65_537], "its token 1 has 65537 bytes, 65536 at most"),
        ([b"%d" % number for number in range(70_000)] + [b"7"], "tokens 7 and 70000"),
    ],
)
def test_tokens_that_are_the_same_to_llama_cpp_are_said(tmp_path: Path, tokens: list[bytes], said: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(with_tokens(tokens).build())
    assert said in refusal(path)


def with_tokens(tokens: list[bytes], tokenizer: bytes = b"gpt2") -> Draft:
    pairs = [Pair(b"general.architecture", 8, text(b"llama")), Pair(b"tokenizer.ggml.model", 8, text(tokenizer))]
    return Draft([*pairs, Pair(b"tokenizer.ggml.tokens", 9, texts(*tokens))], model_tensors())


def test_tokens_of_any_bytes_that_differ_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    tokens = [b"", b"\0", b"\xff", b"[EMPTY_9]", b"x" * 65_536, *(b"y" * number for number in range(1, 900))]
    path.write_bytes(with_tokens(tokens).build())
    assert check_gguf(path).vocab_tokens == len(tokens)
    path.write_bytes(with_tokens([b"a", b"a"], tokenizer=b"no_vocab").build())
    assert check_gguf(path).vocab_tokens == 2


def test_more_tokens_than_any_vocabulary_has_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(with_tokens([]).build())
    content = path.read_bytes()
    at = content.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8
    path.write_bytes(content[:at] + struct.pack("<Q", (1 << 21) + 1) + content[at + 8 :])
    os.truncate(path, 1 << 25)
    assert "a vocabulary of 2097153 tokens, 2097152 at most" in refusal(path)


def test_texts_are_told_on_one_line_and_an_architecture_must_be_one(tmp_path: Path) -> None:
    info = check_gguf(
        make_model(tmp_path / "m.gguf", lambda writer: writer.add_license("MIT\n\nDo\x1b[2J as  you like"))
    )
    assert info.license == "MIT Do [2J as you like"
    path = tmp_path / "odd.gguf"
    path.write_bytes(Draft([Pair(b"general.architecture", 8, text(b"ll\nama"))], model_tensors()).build())
    assert r"its architecture is 'll\nama'" in refusal(path)


def test_a_bool_is_no_size(tmp_path: Path) -> None:
    info = check_gguf(make_model(tmp_path / "m.gguf", lambda writer: writer.add_bool("general.file_type", True)))
    assert info.quantization is None


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_told_apart_by_where_llama_cpp_puts_them(tmp_path: Path, tied: bool) -> None:
    def tune(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("token_embd.weight", np.ones((4, 64), np.float16))
        writer.add_tensor("output_norm.weight", np.ones(64, np.float32))
        if not tied:
            writer.add_tensor("output.weight", np.ones((4, 64), np.float32))

    shape = check_gguf(make_model(tmp_path / "m.gguf", tune)).shape
    assert shape.input_bytes == 512
    assert shape.output_bytes == 256 + (512 if tied else 1024)
    assert shape.weight_bytes == 3 * 768 + 512 + 256 + (0 if tied else 1024)
    # The output layer goes first, then the last block.
    assert shape.offloaded_bytes(2) == shape.output_bytes + 768
    assert shape.host_bytes(2) == 512 + 2 * 768


def test_a_state_of_another_kind_is_bounded_by_what_full_attention_keeps(tmp_path: Path) -> None:
    shape = check_gguf(make_model(tmp_path / "m.gguf", lambda writer: writer.add_ssm_conv_kernel(4))).shape
    assert not shape.cache_known
    assert shape.cache_values == ((64, 64),) * 3


def test_an_adapter_is_not_taken_for_a_model(tmp_path: Path) -> None:
    path = make_model(tmp_path / "m.gguf", lambda writer: writer.add_type("adapter"))
    assert "--lora" in refusal(path)


def test_heads_may_differ_from_layer_to_layer(tmp_path: Path) -> None:
    info = check_gguf(make_model(tmp_path / "m.gguf", kv_heads=[1, 2, 4]))
    assert info.kv_heads == 4
    assert info.kv_bytes_per_token == 2 * (1 + 2 + 4) * 32
    odd = check_gguf(make_model(tmp_path / "odd.gguf", kv_heads=[1, 2]))
    assert odd.kv_bytes_per_token is None


def test_lengths_of_keys_and_values_given_by_the_model_count(tmp_path: Path) -> None:
    def tune(writer: gguf.GGUFWriter) -> None:
        writer.add_key_length(128)
        writer.add_value_length(64)

    assert check_gguf(make_model(tmp_path / "m.gguf", tune)).kv_bytes_per_token == 2 * 3 * 2 * 192


def test_a_model_with_another_kind_of_state_has_no_kv_size(tmp_path: Path) -> None:
    path = make_model(tmp_path / "m.gguf", lambda writer: writer.add_ssm_conv_kernel(4))
    assert check_gguf(path).kv_bytes_per_token is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"GG", "not a GGUF"),
        (b"PK\x03\x04" + bytes(100), "not a GGUF"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(100), "version 1"),
        (b"GGUF" + struct.pack("<I", 99) + bytes(100), "version 99"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(100), "big-endian"),
        (b"GGUF" + struct.pack("<I", 3), "truncated"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "claims 1152921504606846976 tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 40), "1099511627776 keys"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 50) + bytes(9), "a key of"),
        (b"GGUF" + struct.pack("<IQQQ2s", 3, 0, 1, 2, b"\xff\xff") + bytes(9), "not UTF-8"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"a", 77) + bytes(9), "unknown type 77"),
        (b"GGUF" + struct.pack("<IQQQ1sIQ", 3, 0, 1, 1, b"a", 8, 1 << 40), "a string of"),
        (b"GGUF" + struct.pack("<IQQQ1sIQ", 3, 0, 1, 1, b"a", 8, 5000), "truncated"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 8, 1 << 62), "strings"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 12, 1 << 62), "numbers"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 9, 1), "one of arrays"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + struct.pack("<Q1sIB", 1, b"a", 0, 1) * 2, "there twice"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "no weights"),
        (b"GGUF" + struct.pack("<IQQ", 3, 9, 9), "it claims 9 tensors and 9 keys, and 0 bytes are left"),
        (b"GGUF" + struct.pack("<IQQQ17sII", 3, 0, 1, 17, b"general.alignment", 4, 3), "alignment of 3"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 1, 0, 1, b"t", 5) + bytes(50), "5 dimensions"),
        (b"GGUF" + struct.pack("<IQQQ1sIqIQ", 3, 1, 0, 1, b"t", 1, -4, 0, 0), "shape"),
        (b"GGUF" + struct.pack("<IQQQ1sIqqIQ", 3, 1, 0, 1, b"t", 2, 1 << 40, 1 << 40, 0, 0), "shape"),
        (b"GGUF" + struct.pack("<IQQQ1sIqIQ", 3, 1, 0, 1, b"t", 1, 4, 0, 7), "not aligned"),
        (b"GGUF" + struct.pack("<IQQQ1sIqIQ", 3, 1, 0, 1, b"t", 1, 33, 2, 0), "blocks of 32"),
        (b"GGUF" + struct.pack("<IQQQ1sIqIQ", 3, 1, 0, 1, b"t", 1, 4, 0, 0) + bytes(20), "tensors end at byte"),
        (b"GGUF" + struct.pack("<IQQQ1sIqIQ", 3, 1, 0, 1, b"t", 1, 4, 0, 0) + bytes(60), "its architecture"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    assert said in refusal(path)


def test_what_is_no_file_is_said(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "none.gguf")
    assert "is a directory" in refusal(tmp_path)
    os.mkfifo(tmp_path / "fifo.gguf")
    assert "not a file" in refusal(tmp_path / "fifo.gguf")
    with pytest.raises(ModelFileError, match="null"):
        check_gguf(Path("a\0b.gguf"))
    for check in (fingerprint, check_gguf):
        with pytest.raises(ModelFileError):
            check(tmp_path / "m.gguf" / "x")


def test_a_model_cut_at_any_byte_is_refused(tmp_path: Path, model_bytes: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(model_bytes)
    needed = check_gguf(path).file_bytes
    for size in range(needed - 1, -1, -7):
        os.truncate(path, size)
        assert "truncated" in refusal(path) or size < 8


@given(
    st.lists(st.tuples(st.integers(0, 1500), st.integers(0, 255)), min_size=1, max_size=6),
    st.integers(0, 1 << 16),
)
@settings(max_examples=300)
@pytest.mark.slow
def test_a_changed_model_is_accepted_or_refused(
    tmp_path_factory: pytest.TempPathFactory,
    model_bytes: bytes,
    changes: list[tuple[int, int]],
    cut: int,
) -> None:
    content = bytearray(model_bytes)
    for place, value in changes:
        content[place % len(content)] = value
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    path.write_bytes(content[: len(content) - cut % 40])
    said = ""
    try:
        check_gguf(path)
    except ModelFileError as error:
        said = str(error)
    assert "\n" not in said


def test_memory_is_bounded_whatever_a_file_claims(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    # A text of 64 MB and an array of 100 million numbers, in a file that has room for them (sparse).
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + struct.pack("<Q1sIQ", 1, b"a", 8, 1 << 26)
    with open(path, "wb") as file:
        file.write(head)
        file.seek(len(head) + (1 << 26))
        file.write(struct.pack("<Q1sIIQ", 1, b"b", 9, 12, 10**8))
        file.truncate(1 << 30)
    tracemalloc.start()
    try:
        assert "no weights" in refusal(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


def split(folder: Path, parts: int = 3) -> list[Path]:
    paths = []
    for number in range(parts):

        def tune(writer: gguf.GGUFWriter, number: int = number) -> None:
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", parts)
            writer.add_int32("split.tensors.count", sum(range(parts)))

        paths.append(
            make_model(folder / f"big-{number + 1:05d}-of-{parts:05d}.gguf", tune, number, first=sum(range(number)))
        )
    return paths


def test_a_split_model_is_one_model(tmp_path: Path) -> None:
    paths = split(tmp_path)
    info = check_gguf(paths[0])
    assert info.parts == tuple(paths)
    assert info.tensors == 0 + 1 + 2
    assert info.file_bytes == sum(path.stat().st_size for path in paths)


def test_a_split_model_lacking_a_part_or_begun_in_the_middle_is_refused(tmp_path: Path) -> None:
    paths = split(tmp_path)
    assert "Give the first one" in refusal(paths[1])
    renamed = paths[0].rename(tmp_path / "renamed.gguf")
    assert "original names" in refusal(renamed)
    renamed.rename(paths[0])
    content = paths[2].read_bytes()
    paths[2].write_bytes(content[:-40])
    with pytest.raises(ModelFileError, match=f"{paths[2].name} is truncated"):
        check_gguf(paths[0])
    paths[2].write_bytes(paths[1].read_bytes())
    with pytest.raises(ModelFileError, match="not part 3 of 3"):
        check_gguf(paths[0])
    paths[2].unlink()
    assert f"{paths[2].name} is not there" in refusal(paths[0])


Part = Callable[[list[Draft]], None]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda parts: parts[1].pairs.append(Pair(b"general.architecture", 8, text(b"bert"))),
            "a part of another model",
        ),
        (lambda parts: parts[1].tensors.append(model_tensors()[0]), "'token_embd.weight', which an earlier part has"),
        (lambda parts: parts[1].tensors.pop(), "have 3 tensors, but its split.tensors.count is 4"),
        (lambda parts: parts[0].pairs.pop(), "split.tensors.count is missing"),
        (lambda parts: parts[1].pairs.__delitem__(0), "not part 2 of 2"),
        # llama.cpp would abort on this one.
        (lambda parts: parts[1].pairs.__setitem__(0, Pair(b"split.no", 4, bytes(4))), "its split.no has the type 4"),
        (lambda parts: parts[1].pairs.__setitem__(1, Pair(b"split.count", 2, b"\3\0")), "not part 2 of 2"),
        (lambda parts: parts[0].pairs.__setitem__(-2, Pair(b"split.count", 4, bytes(4))), "split.count has the type 4"),
        (lambda parts: parts[0].pairs.__setitem__(-2, Pair(b"split.count", 2, bytes(2))), "but not by its header"),
    ],
)
def test_parts_that_disagree_are_refused(tmp_path: Path, change: Part, said: str) -> None:
    tensors = model_tensors()
    parts = [part(0, 2, tensors[:2], 4), part(1, 2, tensors[2:], 4)]
    paths = [tmp_path / f"m-{number:05d}-of-00002.gguf" for number in (1, 2)]

    def written() -> Path:
        for path, draft in zip(paths, parts, strict=True):
            path.write_bytes(draft.build())
        return paths[0]

    assert check_gguf(written()).tensors == 4
    change(parts)
    with pytest.raises(ModelFileError, match=re.escape(said)):
        check_gguf(written())


def test_tensors_are_counted_over_all_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.ggufparts.TENSORS_MAX", 2)
    with pytest.raises(ModelFileError, match="have more than 2 tensors"):
        check_gguf(split(tmp_path)[0])


def test_fingerprint_sees_size_head_tail_and_samples(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    content = bytearray(np.random.default_rng(1).bytes(4 << 20))
    path.write_bytes(content)
    original = fingerprint(path)
    assert original == fingerprint(path)
    assert original.startswith("sampled-sha256:")
    for place in (0, (1 << 20) - 1, 1 << 20, len(content) // 2 - (1 << 18), len(content) - 1):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        seen = fingerprint(path) != original
        assert seen or place == len(content) // 2 - (1 << 18), "what lies between samples is not seen"
    path.write_bytes(content + b"\0")
    assert fingerprint(path) != original


def test_fingerprint_of_a_small_file_covers_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(bytes(1 << 20))
    original = fingerprint(path)
    changed = bytearray(1 << 20)
    changed[1 << 19] = 1
    path.write_bytes(changed)
    assert fingerprint(path) != original


def test_fingerprint_covers_all_parts(tmp_path: Path) -> None:
    paths = split(tmp_path)
    original = fingerprint(paths[0])
    with open(paths[2], "ab") as file:
        file.write(b"x")
    assert fingerprint(paths[0]) != original


@pytest.mark.slow
def test_a_real_model_is_understood(real_model: Path) -> None:
    info = check_gguf(real_model)
    assert info.architecture == "llama"
    assert info.chat_template
    assert info.vocab_tokens == 49_152
    assert info.kv_bytes_per_token == 2 * 30 * 3 * 128

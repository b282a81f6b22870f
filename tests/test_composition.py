"""libra.attach next to everything else that people do with a model: ways to generate, copies, threads,
adapters, pipelines."""

import copy
import threading

import accelerate
import families
import numpy as np
import peft
import pytest
import tiny
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from families import IMAGE, SAID, by_hand, collate, talk
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Cache,
    CLIPImageProcessor,
    DynamicCache,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    QuantizedCache,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    StaticCache,
    TextIteratorStreamer,
    pipeline,
)
from transformers.cache_utils import DynamicLayer

import libra
from libra import Compression
from libra.engine.transformers_api import cache_argument, cache_of

CLOSE = dict(atol=1e-4, rtol=1e-4)
LIBRA = Compression(method="libra", layers=(1, 3), tau=0.6)
RANDOM = Compression(method="random", layers=(1, 3))
LLAVA, QWEN = "LlavaForConditionalGeneration", "Qwen2VLForConditionalGeneration"
STEPS = 5
every_family = pytest.mark.parametrize(
    "family", families.KINDS, ids=lambda value: value.replace("ForConditionalGeneration", "")
)
two_families = pytest.mark.parametrize("family", [LLAVA, QWEN])


def talks_of(family: str) -> list[families.Talk]:
    return [talk(family, pattern, seed) for seed, pattern in enumerate(["t2 v t3 i t4", "t4 i t5", "t6"])]


def batch_of(family: str) -> dict[str, torch.Tensor]:
    return collate(family, talks_of(family))


def answered(family: str) -> dict[str, torch.Tensor]:
    return collate(
        family, [talk(family, "t3 i t3 a4", 3), talk(family, "t2 v t3 a2", 4)], "right", labels=True
    )


def hand(family: str, t: families.Talk, said=(), c: Compression = LIBRA) -> torch.Tensor:
    return by_hand(families.model(family, "", "eager"), family, t, c, said).logits


def compressed(family: str, model=None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of the batch, greedy ids, and the loss of the answers, as the shared model gives them under
    ``LIBRA``."""
    model = families.model(family) if model is None else model
    with torch.no_grad(), libra.attach(model, LIBRA):
        return everything(family, model)


@torch.no_grad()
def everything(family: str, model) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    given = batch_of(family)
    ids = model.generate(**given, max_new_tokens=STEPS, **SAID)
    return model(**given).logits, ids, model(**answered(family)).loss


def assert_same(one: tuple, other: tuple) -> None:
    for value, wanted in zip(one, other, strict=True):
        torch.testing.assert_close(value, wanted, **CLOSE)


# --- ways to generate ---


@every_family
@torch.no_grad()
def test_beams_and_several_sequences(family):
    """A batch is each sample alone; every sampled sequence is what its own ids give by hand; a seed gives the
    same ones."""
    # One picture a row at most: older releases hand a row's second picture to the next sequence.
    model, talks = (
        families.model(family),
        [talk(family, pattern, 1) for pattern in ("t2 v t4", "t4 i t5", "t6")],
    )
    given = collate(family, talks)
    beams = dict(max_new_tokens=3, **SAID, num_beams=3, num_return_sequences=2)
    drawing = dict(max_new_tokens=3, **{**SAID, "do_sample": True}, num_return_sequences=2)
    with libra.attach(model, LIBRA) as handle:
        batch = model.generate(**given, **beams)[:, -3:]
        for b, t in enumerate(talks):
            assert torch.equal(
                model.generate(**collate(family, [t]), **beams)[:, -3:], batch[2 * b : 2 * b + 2]
            )
        torch.manual_seed(1)
        drawn = model.generate(**given, **drawing, return_dict_in_generate=True, output_logits=True)
        assert len(handle.stats["visual_tokens"][0]) == 6
        torch.manual_seed(1)
        assert torch.equal(model.generate(**given, **drawing), drawn.sequences)
    assert len({tuple(ids) for ids in drawn.sequences[:, -3:].tolist()}) > 3
    for k in (0, 3, 4):
        want = hand(family, talks[k // 2], drawn.sequences[k, -3:-1].tolist())[-3:]
        torch.testing.assert_close(torch.stack(drawn.logits, 1)[k], want, **CLOSE)


@pytest.mark.parametrize("c", [LIBRA, RANDOM], ids=["libra", "random"])
@every_family
@torch.no_grad()
def test_assisted_generation_is_plain_greedy(family, c):
    """Guesses stand after the prompt in its prefill and have no say in what is kept."""
    model, wrong = families.model(family), families.own_model(family, seed=1)
    right = families.own_model(family)
    given = collate(family, talks_of(family)[:1])
    with libra.attach(model, c) as handle:
        want, stats = model.generate(**given, max_new_tokens=8, **SAID), handle.stats
        helpers = [{"prompt_lookup_num_tokens": 3}, {"assistant_model": right}, {"assistant_model": wrong}]
        for options in helpers if c is LIBRA else helpers[:1]:
            assert torch.equal(model.generate(**given, max_new_tokens=8, **SAID, **options), want)
            assert handle.stats["visual_tokens"] == stats["visual_tokens"]


@every_family
@torch.no_grad()
def test_a_guess_may_repeat_a_placeholder(family):
    """Prompt lookup guesses what stood after the same word before, here a picture's marks: without a picture
    they are text."""
    model, guessed = families.model(family), False
    few = [token for token in range(families.VOCABULARY) if token not in (5, 6, families.START, IMAGE)]
    options = dict(max_new_tokens=8, do_sample=False, suppress_tokens=few)
    for seed in range(3):
        t, seen = talk(family, "t1 i t3", seed), []
        given = collate(family, [families.Talk(torch.cat([torch.tensor([5]), t.ids[1:]]), t.labels, t.given)])
        with libra.attach(model, LIBRA):
            want = model.generate(**given, **options)
            hook = model.model.register_forward_pre_hook(
                lambda module, args, kwargs, seen=seen: seen.append(kwargs["input_ids"]), with_kwargs=True
            )
            got = model.generate(**given, **options, prompt_lookup_num_tokens=4, max_matching_ngram_size=1)
            hook.remove()
        assert torch.equal(got, want)
        guessed |= any(ids.shape[1] > 1 and bool((ids == IMAGE).any()) for ids in seen[1:])
    assert guessed


@every_family
@torch.no_grad()
def test_a_second_turn_of_text(family):
    """generate with the whole conversation and the first turn's cache: the choice is not made again."""
    model, t = families.model(family), talks_of(family)[0]
    with libra.attach(model, LIBRA) as handle:
        first = model.generate(**collate(family, [t]), max_new_tokens=3, **SAID, return_dict_in_generate=True)
        stats = handle.stats
        ids = torch.cat([first.sequences, torch.tensor([[5, 6, 7, 8]])], 1)
        again = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **cache_argument(cache_of(first)),
            max_new_tokens=3,
            **SAID,
            return_dict_in_generate=True,
            output_logits=True,
        )
        assert handle.stats == stats
    want = hand(family, t, again.sequences[0, len(t.ids) : -1].tolist())[-3:]
    torch.testing.assert_close(torch.stack(again.logits, 1)[0], want, **CLOSE)


@pytest.mark.parametrize("family", [family for family in families.KINDS if not family.startswith("Qwen")])
@torch.no_grad()
def test_a_second_turn_with_another_picture(family):
    """Its tokens alone are compressed, scored by the new last token, next to the shorter first turn. (Qwen's
    own generate cannot add a picture to a cache.)"""
    model, twin = families.model(family), families.model(family, "", "eager")
    first, second = talk(family, "t2 i t3", 5), talk(family, "t3 i t4", 6)
    whole = families.Talk(
        *(torch.cat(parts) for parts in ((first.ids, second.ids), (first.labels, second.labels))), []
    )
    cache = DynamicCache(config=model.config.get_text_config())
    with libra.attach(model, LIBRA) as handle:
        model(**collate(family, [first]), **cache_argument(cache), use_cache=True)
        counts = handle.stats["visual_tokens"]
        given = {**collate(family, [second]), **collate(family, [whole])}
        out = model.generate(
            **given,
            **cache_argument(cache),
            max_new_tokens=3,
            **SAID,
            return_dict_in_generate=True,
            output_logits=True,
        )
        assert handle.stats["visual_tokens"] == counts and handle.stats["cache"]["earlier"] > 0

    both = families.Talk(whole.ids, whole.labels, first.given + second.given)
    want = by_hand(
        twin, family, both, LIBRA, out.sequences[0, -3:-1].tolist(), starts=(0, len(first.ids))
    ).logits[-3:]
    torch.testing.assert_close(torch.stack(out.logits, 1)[0], want, **CLOSE)


@every_family
@torch.no_grad()
def test_embeddings(family):
    """With the pictures next to them; or with the pictures in them, where the handle is told which columns
    they are."""
    model, given = families.model(family), batch_of(family)
    visual = (given["input_ids"] == IMAGE) | (given["input_ids"] == families.VIDEO)
    want, ids, _ = compressed(family)
    embeds = model.get_input_embeddings()(given["input_ids"])
    others = {name: value for name, value in given.items() if name != "input_ids"}
    told = families.decoder_arguments(model, given)
    inside = {name: told[name] for name in ("inputs_embeds", "position_ids")}
    with libra.attach(model, LIBRA) as handle:
        if not family.startswith("Qwen"):  # which has other positions without ids
            said = model.generate(inputs_embeds=embeds, **others, max_new_tokens=STEPS, **SAID)
            assert torch.equal(said, ids[:, -STEPS:])
            torch.testing.assert_close(model(inputs_embeds=embeds, **others).logits, want, **CLOSE)
        counts = [list(visual.sum(1))] if handle.stats is None else handle.stats["visual_tokens"]
        handle.mark_visual_tokens(visual)
        if family != "Qwen3VLForConditionalGeneration":  # whose pictures come in deeper layers too
            logits = model(**inside, attention_mask=given["attention_mask"]).logits
            torch.testing.assert_close(logits, want, **CLOSE)
        else:
            model(**inside, attention_mask=given["attention_mask"])
        assert handle.stats["visual_tokens"][0] == [int(n) for n in counts[0]]
        handle.mark_visual_tokens(visual)
        beams = model.generate(
            inputs_embeds=inside["inputs_embeds"],
            attention_mask=given["attention_mask"],
            max_new_tokens=2,
            num_beams=2,
            **SAID,
        )
        assert beams.shape == (3, 2) and len(handle.stats["visual_tokens"][0]) == 6
        with pytest.raises(ValueError, match="embeddings without ids do not say"):
            model(**inside, attention_mask=given["attention_mask"])
        handle.mark_visual_tokens(visual[:, 1:])
        with pytest.raises(ValueError, match="the marked visual tokens are .* but the prompt is"):
            model(**inside, attention_mask=given["attention_mask"])
        with pytest.raises(ValueError, match=r"must be \(batch, tokens\)"):
            handle.mark_visual_tokens(visual[0])


@two_families
@torch.no_grad()
def test_hidden_states_of_generate(family):
    model, t = families.model(family), talks_of(family)[0]
    with libra.attach(model, LIBRA) as handle:
        out = model.generate(
            **collate(family, [t]),
            max_new_tokens=3,
            **SAID,
            return_dict_in_generate=True,
            output_hidden_states=True,
        )
    widths = [state.shape[1] for state in out.hidden_states[0]]
    assert len(widths) == 7 and widths[1] == widths[2] > widths[3] == widths[4] > widths[5]
    visual = [row[0] for row in handle.stats["visual_tokens"]]
    assert widths[1] - widths[5] == visual[0] - visual[5] - sum(
        map(sum, handle.stats["compensation_tokens"][:5])
    )
    assert all(state.shape[1] == 1 for step in out.hidden_states[1:] for state in step)


def words() -> PreTrainedTokenizerFast:
    """One word for each of the models' ids."""
    names = {
        families.IMAGE: "<image>",
        families.VIDEO: "<video>",
        families.START: "<start>",
        families.END: "<end>",
        0: "<pad>",
    }
    vocabulary = {names.get(i, f"w{i}"): i for i in range(families.VOCABULARY)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        padding_side="left",
        additional_special_tokens=["<image>", "<video>", "<start>", "<end>"],
    )


@two_families
@torch.no_grad()
def test_streaming(family):
    """A thread generates, its words arrive one by one."""
    model, given = families.model(family), collate(family, talks_of(family)[:1])
    tokenizer = words()
    with libra.attach(model, LIBRA):
        want = tokenizer.decode(model.generate(**given, max_new_tokens=STEPS, **SAID)[0, -STEPS:])
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        thread = threading.Thread(
            target=model.generate, kwargs=dict(**given, max_new_tokens=STEPS, **SAID, streamer=streamer)
        )
        thread.start()
        parts = [part for part in streamer if part]
        thread.join()
    assert "".join(parts).split() == want.split() and len(parts) == STEPS


class Other(DynamicCache):
    pass


def quantized(config) -> QuantizedCache:
    """As its own constructor makes it, but for the packages that quantise."""
    cache = QuantizedCache.__new__(QuantizedCache)
    Cache.__init__(cache, layer_class_to_replicate=DynamicLayer)
    return cache


@pytest.mark.parametrize(
    "make", [lambda config: StaticCache(config=config, max_cache_len=128), quantized, lambda _: Other()]
)
@torch.no_grad()
def test_other_caches_are_refused(make):
    model, given = families.model(LLAVA), batch_of(LLAVA)
    cache = make(model.config.text_config)
    with libra.attach(model, LIBRA):
        with pytest.raises(ValueError, match=f"needs a DynamicCache, .* got {type(cache).__name__};"):
            model(**given, **cache_argument(cache), use_cache=True)
        with pytest.raises(ValueError, match="needs a DynamicCache"):
            model.generate(**given, max_new_tokens=2, cache_implementation="static")
        model(**given)


# --- copies, threads, other models ---


@torch.no_grad()
def test_two_families_at_once():
    want = {family: compressed(family) for family in (LLAVA, QWEN)}
    plain = {family: everything(family, families.model(family)) for family in (LLAVA, QWEN)}
    with libra.attach(families.model(LLAVA), LIBRA) as one:
        with libra.attach(families.model(QWEN), LIBRA) as two:
            for family in (LLAVA, QWEN):
                assert_same(everything(family, families.model(family)), want[family])
                with pytest.raises(ValueError, match="attached to this model already; detach it first"):
                    libra.attach(families.model(family), LIBRA)
            assert one.stats["visual_tokens"] != two.stats["visual_tokens"]
        assert_same(everything(QWEN, families.model(QWEN)), plain[QWEN])
        assert_same(everything(LLAVA, families.model(LLAVA)), want[LLAVA])


def run_threads(jobs) -> list:
    """Each job (no arguments) in a thread of its own, all at once; an exception of any is raised here."""
    results, start = [None] * len(jobs), threading.Barrier(len(jobs))

    def run(k: int) -> None:
        try:
            start.wait(60)
            results[k] = jobs[k]()
        except Exception as error:
            results[k] = error

    threads = [threading.Thread(target=run, args=(k,)) for k in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


@torch.no_grad()
def test_threads_on_two_models():
    want = {family: compressed(family) for family in (LLAVA, QWEN)}
    with libra.attach(families.model(LLAVA), LIBRA), libra.attach(families.model(QWEN), LIBRA):
        jobs = [
            lambda family=family: [everything(family, families.model(family)) for _ in range(3)]
            for family in want
        ]
        for family, results in zip(want, run_threads(jobs), strict=True):
            for result in results:
                assert_same(result, want[family])


@pytest.mark.parametrize("family", [LLAVA, "LlavaOnevisionForConditionalGeneration"])
@torch.no_grad()
def test_threads_on_one_model(family):
    """Other batches at the same time. (Qwen's models remember the last prefill's positions themselves.)"""
    model, talks = families.model(family), talks_of(family)
    batches = [collate(family, rows) for rows in (talks, talks[1:], talks[:1])]
    loss = answered(family)
    with libra.attach(model, LIBRA):
        want = [model.generate(**given, max_new_tokens=3, **SAID) for given in batches]
        trained = model(**loss).loss

        def generate(given):
            with torch.no_grad():
                return [model.generate(**given, max_new_tokens=3, **SAID) for _ in range(3)]

        jobs = [lambda given=given: generate(given) for given in batches]
        *said, losses = run_threads([*jobs, lambda: [model(**loss).loss.detach() for _ in range(5)]])
    for ids, wanted in zip(said, want, strict=True):
        assert all(torch.equal(one, wanted) for one in ids)
    torch.testing.assert_close(torch.stack(losses), trained.expand(5), **CLOSE)


@two_families
def test_a_deep_copy_outlives_the_original(family):
    model, want = families.own_model(family), compressed(family)
    plain = everything(family, model)
    with libra.attach(model, LIBRA) as handle:
        other, others = copy.deepcopy((model, handle))
    assert_same(everything(family, model), plain)
    assert_same(everything(family, other), want)
    assert handle.stats is None
    assert others.stats["visual_tokens"][0] == [
        int(t.visual.sum()) for t in (talk(family, "i", 0), talk(family, "v", 0))
    ]
    others.detach()
    assert_same(everything(family, other), plain)
    assert type(other.model.language_model) is type(model.model.language_model)


@two_families
@torch.no_grad()
def test_another_dtype_while_attached(family):
    model, given = families.own_model(family), batch_of(family)
    with libra.attach(model, LIBRA) as handle:
        model.to(torch.bfloat16)
        given = {
            name: value.bfloat16() if value.is_floating_point() else value for name, value in given.items()
        }
        out = model(**given)
        assert out.logits.dtype == torch.bfloat16 and out.logits.isfinite().all()
        assert handle.stats["visual_tokens"][-1] == ([8, 4, 0] if family == LLAVA else [10, 6, 0])
        model.to(torch.float32)
    assert model(**batch_of(family)).logits.shape[1] == given["input_ids"].shape[1]


@two_families
def test_saving_leaves_no_trace(family, tmp_path):
    model = families.own_model(family, attention="eager")
    plain = everything(family, model)
    with libra.attach(model, LIBRA):
        everything(family, model)
        model.save_pretrained(tmp_path)
    assert_same(
        everything(family, type(model).from_pretrained(tmp_path, attn_implementation="eager").eval()), plain
    )


# --- torch.compile ---


@torch.no_grad()
def test_compiled_layers():
    """Regional compilation, before or while the compression is attached; the seams between the layers stay
    eager."""
    torch._dynamo.reset()
    model, given = families.own_model(LLAVA, num_hidden_layers=3), collate(LLAVA, talks_of(LLAVA)[1:2])
    with libra.attach(model, Compression(method="libra", layers=(1,), tau=0.6)) as handle:
        want = model(**given).logits
        model.model.language_model.layers[2].compile(backend="eager")
        model.model.language_model.layers[1].compile(backend="eager")
        torch.testing.assert_close(model(**given).logits, want, **CLOSE)
        assert handle.stats["visual_tokens"][-1] == [8]
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "while attached"])
@pytest.mark.parametrize("what", ["layers", "model.forward", "model", "decoder", "wrapper"])
@torch.no_grad()
def test_compiled_in_other_ways(what, when):
    """Compression is neither skipped nor left behind, whichever code was compiled first."""
    torch._dynamo.reset()
    model, given = families.own_model(LLAVA, num_hidden_layers=2), collate(LLAVA, talks_of(LLAVA)[1:2])
    decoder, c, called = model.model.language_model, Compression(method="libra", layers=(0,), tau=0.6), model

    def ask():
        return called(**given).logits, called.generate(**given, max_new_tokens=2, **SAID)

    def compile_it():
        if what == "layers":
            for layer in decoder.layers:
                layer.compile(backend="eager")
        elif what == "model.forward":
            model.forward = torch.compile(model.forward, backend="eager")
        elif what in ("model", "decoder"):
            {"model": model, "decoder": decoder}[what].compile(backend="eager")
        return torch.compile(model, backend="eager") if what == "wrapper" else model

    plain = ask()
    with libra.attach(model, c):
        short = ask()
    if when == "before":
        called = compile_it()
        assert_same(ask(), plain)
    with libra.attach(model, c):
        if when != "before":
            called = compile_it()
        assert_same(ask(), short)
    assert_same(ask(), plain)
    torch._dynamo.reset()


@torch.no_grad()
def test_a_replaced_forward_is_refused():
    model = families.own_model(LLAVA)
    decoder = model.model.language_model
    decoder.forward = torch.compile(decoder.forward, backend="eager")
    with pytest.raises(
        ValueError, match=r"forward of this model's LlamaModel was replaced .*attach first, then replace it"
    ):
        libra.attach(model, LIBRA)
    with pytest.raises(ValueError, match="wrapper of torch.compile; attach to the model in it first"):
        libra.attach(torch.compile(model), LIBRA)


# --- adapters, hooks, quantised modules, checkpointing ---


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("to", ["the adapter", "its base", "the base before"])
@two_families
def test_peft_adapters(family, to, task):
    """Forward by name and by place, loss, generation and a training step."""
    model, (logits, ids, loss) = families.own_model(family), compressed(family)
    plain = everything(family, model)
    handle = libra.attach(model, LIBRA) if to == "the base before" else None
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type=task)
    adapted = peft.get_peft_model(model, config)
    handle = handle or libra.attach(adapted if to == "the adapter" else model, LIBRA)
    with handle:
        assert_same(everything(family, adapted), (logits, ids, loss))
        given = batch_of(family)
        by_place = adapted(given.pop("input_ids"), **given).logits
        torch.testing.assert_close(by_place, logits, **CLOSE)
        adapted.train()
        optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            training = adapted(**answered(family)).loss
            training.backward()
            optimizer.step()
        assert training < loss
        adapted.eval()
    if to != "the base before":
        with adapted.disable_adapter():
            assert_same(everything(family, adapted), plain)


def hooked(model) -> list[torch.nn.Module]:
    """The modules that a device map may put its hooks on, the decoder itself among them."""
    modules = [model.model.language_model, model.model, model]
    for module in modules:
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    return modules


@pytest.mark.parametrize("how", ["dispatch_model", "cpu_offload", "hooks on the decoder"])
@two_families
def test_accelerates_device_maps(family, how):
    """Compression is not skipped where a module's forward is another one on the instance."""
    model, want = families.own_model(family), compressed(family)
    plain = everything(family, model)
    if how == "dispatch_model":
        parts = {"lm_head": "cpu", **{f"model.{name}": "cpu" for name, _ in model.model.named_children()}}
        accelerate.dispatch_model(model, parts, main_device="cpu", force_hooks=True)
        assert hasattr(model.model.language_model, "_old_forward")
    elif how == "cpu_offload":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        hooked(model)
    with libra.attach(model, LIBRA):
        assert_same(everything(family, model), want)
    assert_same(everything(family, model), plain)


@pytest.mark.parametrize("story", ["on, off, attach", "on, attach, off", "attach, on, off", "attach, on"])
@two_families
def test_device_hooks_that_come_and_go(family, story):
    model, want = families.own_model(family), compressed(family)
    plain, handle, modules = everything(family, model), None, []
    for step in story.split(", "):
        if step == "on":
            modules = hooked(model)
        elif step == "attach":
            handle = libra.attach(model, LIBRA)
        else:
            for module in modules:
                remove_hook_from_module(module)
    assert_same(everything(family, model), want)
    handle.detach()
    assert_same(everything(family, model), plain)
    for module in modules:
        remove_hook_from_module(module)
    assert_same(everything(family, model), plain)


class Linear8bit(torch.nn.Module):
    """As bitsandbytes' modules look from outside: weights of whole numbers, a forward of its own."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        self.scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.weight = torch.nn.Parameter(
            (linear.weight / self.scale).round().to(torch.int8), requires_grad=False
        )
        self.bias = linear.bias

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def quantise(model):
    for name, module in list(model.model.language_model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            model.model.language_model.set_submodule(name, Linear8bit(module))
    return model


@pytest.mark.parametrize("name", ["libra", "pyramiddrop"])
@two_families
@torch.no_grad()
def test_quantised_modules(family, name):
    positions = {"positions": "original"} if name == "pyramiddrop" else {"tau": 0.6}
    c = Compression(method=name, layers=(1, 3), **positions)
    model, twin = (
        quantise(families.own_model(family)),
        quantise(families.own_model(family, attention="eager")),
    )
    assert model.model.language_model.layers[0].self_attn.q_proj.weight.dtype == torch.int8
    with libra.attach(model, c):
        for t in talks_of(family):
            want = by_hand(twin, family, t, c).logits
            torch.testing.assert_close(model(**collate(family, [t])).logits[0], want, **CLOSE)


@every_family
def test_gradient_checkpointing(family):
    """With what a trainer passes, and with the cache that nobody asked for."""
    gradients = []
    for checkpointing in (False, True):
        model = families.own_model(family).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with libra.attach(model, LIBRA) as handle:
            model(**answered(family)).loss.backward()
            assert handle.stats["visual_tokens"][0] != handle.stats["visual_tokens"][-1]
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 50
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)


def test_reentrant_gradient_checkpointing():
    """Whose recomputation runs a layer a second time with gradients."""
    gradients = []
    for checkpointing in (False, True):
        model = families.own_model(LLAVA).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": True})
            model.enable_input_require_grads()
        with libra.attach(model, Compression(method="libra", layers=(1, 5), tau=0.6)):
            model(**answered(LLAVA), use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)


# --- other people's code, unchanged ---

TEMPLATE = (
    "{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }} "
    "{% else %}PICTURE {% endif %}{% endfor %}{% endfor %}"
)


def picture(seed: int, width: int = 40, height: int = 28) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def llava_processor() -> LlavaProcessor:
    size = {"height": 28, "width": 28}
    return LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=size),
        words(),
        patch_size=7,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        image_token="<image>",
        chat_template=TEMPLATE.replace("PICTURE", "<image>"),
    )


def qwen_processor() -> Qwen2VLProcessor:
    sizes = dict(patch_size=4, temporal_patch_size=2, merge_size=2, min_pixels=8 * 8, max_pixels=40 * 40)
    tokenizer = words()
    tokenizer.image_token, tokenizer.video_token = "<image>", "<video>"
    return Qwen2VLProcessor(
        Qwen2VLImageProcessor(**sizes),
        tokenizer,
        Qwen2VLVideoProcessor(**sizes),
        chat_template=TEMPLATE.replace("PICTURE", "<start> <image> <end>"),
    )


@torch.no_grad()
def test_transformers_pipeline():
    model, processor = families.own_model(LLAVA), llava_processor()
    model.generation_config.update(**SAID)
    chats = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": f"w{10 + seed} w7"},
                    {"type": "image", "image": picture(seed)},
                    {"type": "text", "text": "w8 w9 w11"},
                ],
            }
        ]
        for seed in range(2)
    ]

    def ask():
        run = pipeline("image-text-to-text", model=model, processor=processor, device="cpu")
        return [
            run(text=chat, max_new_tokens=STEPS, return_full_text=False)[0]["generated_text"]
            for chat in chats
        ]

    plain = ask()
    with libra.attach(model, LIBRA) as handle:
        short = ask()
        assert [row[0] for row in handle.stats["visual_tokens"]] == [16, 16, 8, 8, 4, 4]
        given = [
            processor.apply_chat_template(c, tokenize=True, return_dict=True, return_tensors="pt")
            for c in chats
        ]
        ids = [model.generate(**inputs, max_new_tokens=STEPS)[0, -STEPS:] for inputs in given]
        assert [text.split() for text in short] == [processor.decode(row).split() for row in ids]
    assert ask() == plain != short


@torch.no_grad()
def test_a_loop_in_the_style_of_llava_hf():
    """lmms-eval's adapter: one document at a time, several images in front of its text."""
    model, processor = families.own_model(LLAVA), llava_processor()
    documents = [("w5 w6 w7", [picture(1)]), ("w9 w5", [picture(2), picture(3)]), ("w8 w8 w6 w5", [])]

    def loop():
        answers = []
        for context, visuals in documents:
            text = " ".join(["<image>"] * len(visuals)) + " w4 " + context if visuals else context
            inputs = processor(images=visuals or None, text=text, return_tensors="pt").to("cpu", model.dtype)
            out = model.generate(
                **inputs,
                do_sample=False,
                temperature=None,
                top_p=None,
                num_beams=1,
                max_new_tokens=STEPS,
                use_cache=True,
                pad_token_id=0,
                eos_token_id=99,
                suppress_tokens=SAID["suppress_tokens"],
            )
            out = out[:, inputs["input_ids"].shape[-1] :]
            answers.append(processor.tokenizer.batch_decode(out, skip_special_tokens=True)[0])
        return answers

    plain, seen = loop(), []
    with libra.attach(model, LIBRA) as handle:
        with tiny.watched() as steps:
            short = loop()
        seen = [step.visual.sum().item() for step in steps]
    assert seen == [16, 8, 32, 16] and handle.stats["visual_tokens"][0] == [32]
    assert short[2] == plain[2] and short[:2] != plain[:2] and loop() == plain


@torch.no_grad()
def test_a_loop_in_the_style_of_qwen2_vl():
    """lmms-eval's adapter: batches of chats, padded on the left, images and none."""
    model, processor = families.own_model(QWEN), qwen_processor()
    documents = [
        ("w5 w6 w7", [picture(1, 40, 32)]),
        ("w9 w5", [picture(2, 24, 24), picture(3, 16, 40)]),
        ("w8 w8 w6 w5", []),
        ("w7 w7", [picture(4, 32, 32)]),
    ]

    def loop():
        answers = []
        for chunk in (documents[:3], documents[3:]):
            chats = [
                [
                    {
                        "role": "user",
                        "content": [{"type": "image"}] * len(visuals) + [{"type": "text", "text": context}],
                    }
                ]
                for context, visuals in chunk
            ]
            texts = [
                processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
                for chat in chats
            ]
            visuals = [image for _, images in chunk for image in images]
            inputs = processor(text=texts, images=visuals, padding=True, return_tensors="pt")
            out = model.generate(**inputs, max_new_tokens=STEPS, use_cache=True, **SAID)
            trimmed = [o[len(i) :] for i, o in zip(inputs.input_ids, out)]
            answers += processor.batch_decode(
                trimmed, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        return answers

    plain, seen = loop(), []
    with libra.attach(model, LIBRA):
        with tiny.watched() as steps:
            short = loop()
        seen = [step.visual.sum(1).tolist() for step in steps]
    assert (
        len(seen) == 4
        and seen[0][2] == 0
        and [sum(row) for row in seen[1::2]] == [sum(row) // 2 for row in seen[::2]]
    )
    assert short[2] == plain[2] and short != plain and loop() == plain

"""kvutils beside what others would use: nnsight, nnterp, and `transformers` alone. `make bench-peers`; about ten minutes on a core.

Three tasks, each written for every way as its documentation recommends, from pictures and a prompt to the result, processor included:

keys and values   image keys (after rotary embedding) and values of all layers
blocked keys      the logits after a question while text cannot attend to half of the image keys of each head in the last third of the layers
18 questions      about one picture, answered in up to `NEW_TOKENS` tokens

Seconds are CPU seconds on one thread, the median of runs that alternate in one process; memory is the peak of resident memory above that of
the loaded model, in a process of its own; lines are those of the functions below without imports, comments and `def`. The peers are
installed beside the first environment (`requirements-peers*.txt`), nnsight twice where nnterp does not work with the newest one. They get a
copy of the model with the same weights: wrapped, a model keeps nnsight's own `forward`. Writes peers.json and README's table."""

import argparse
import ast
import copy
import dataclasses
import datetime
import inspect
import json
import statistics
import subprocess
import sys
import textwrap
import time
import venv
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from architectures import random_mlm
from run import describe_machine
from transformers import DynamicCache
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

import kvutils as kv
from kvutils.datasets.pocket.shapes import CLASSES
from kvutils.models import MLM
from kvutils.run.report import fill, markdown_table
from kvutils.store import read_json, to_json, write_text

FOLDER = Path(__file__).resolve().parent
RESULTS, README = FOLDER / "peers.json", FOLDER.parent / "README.md"
NEW_TOKENS = 4
MODELS = {"pocket": "pocket", "large": "llava-onevision-0.5b"}  # the second one narrow and random, with all its layers and image tokens
VENV = FOLDER.parent / ".venv-peers"
ENVIRONMENTS = {"nnsight": "requirements-peers.txt", "nnterp": "requirements-peers-nnterp.txt"}  # -> the way that is measured there


@dataclasses.dataclass
class Case:
    """A model and what it is asked; `traced` is what nnsight or nnterp made of a copy of it."""

    mlm: MLM
    photos: list
    questions: list[str]
    layers: tuple[int, ...] = ()
    mask: torch.Tensor | None = None  # (layers, G, N): keys to block
    traced: object = None


def keys_kvutils(case: Case) -> list:
    captures = kv.capture(case.mlm, case.photos, features=False)
    return [(one.keys, one.values) for one in captures]


def keys_cache(case: Case, **options) -> list:
    prompts = [case.mlm.prompt()] * len(case.photos)
    inputs = case.mlm.processor(images=case.photos, text=prompts, return_tensors="pt").to(case.mlm.device)
    with torch.no_grad():
        cache = case.mlm.model.model(**inputs, past_key_values=DynamicCache(), **options).past_key_values
    return of_images(case, inputs, [(layer.keys, layer.values) for layer in cache.layers])


def keys_cache_and_states(case: Case) -> list:
    return keys_cache(case, output_hidden_states=True)


def keys_hooks(case: Case) -> list:
    prompts = [case.mlm.prompt()] * len(case.photos)
    inputs = case.mlm.processor(images=case.photos, text=prompts, return_tensors="pt").to(case.mlm.device)
    language, seen = case.mlm.model.model.language_model, {}
    modules = {"rotary": language.rotary_emb}
    for number, layer in enumerate(language.layers):
        modules |= {(number, "keys"): layer.self_attn.k_proj, (number, "values"): layer.self_attn.v_proj}
    hooks = [module.register_forward_hook(lambda _, args, output, name=name: seen.update({name: output})) for name, module in modules.items()]
    try:
        with torch.no_grad():
            case.mlm.model.model(**inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    pairs = []
    for number in range(len(language.layers)):
        keys, values = (seen[number, name].unflatten(-1, (-1, case.mlm.head_dim)).transpose(1, 2) for name in ("keys", "values"))
        pairs.append((apply_rotary_pos_emb(keys, keys, *seen["rotary"])[1], values))
    return of_images(case, inputs, pairs)


def keys_nnsight(case: Case) -> list:
    prompts = [case.mlm.prompt()] * len(case.photos)
    inputs = case.mlm.processor(images=case.photos, text=prompts, return_tensors="pt").to(case.mlm.device)
    with torch.no_grad(), case.traced.trace(**inputs, use_cache=True):
        cache = case.traced.output.past_key_values.save()
    return of_images(case, inputs, [(layer.keys, layer.values) for layer in cache.layers])


def keys_nnterp(case: Case) -> list:
    prompts = [case.mlm.prompt()] * len(case.photos)
    inputs = case.mlm.processor(images=case.photos, text=prompts, return_tensors="pt").to(case.mlm.device)
    with torch.no_grad(), case.traced.trace(**inputs, use_cache=True, logits_to_keep=1):
        cache = case.traced.output.past_key_values.save()
    return of_images(case, inputs, [(layer.keys, layer.values) for layer in cache.layers])


def of_images(case: Case, inputs, pairs: list) -> list:
    """Per picture keys and values (L, G, N, D) of its image tokens, from those of all tokens (B, G, T, D) of each layer."""
    at_image = inputs["input_ids"] == case.mlm.image_token_id
    return [tuple(torch.stack([layer[row][:, at] for layer in each]) for each in zip(*pairs, strict=True)) for row, at in enumerate(at_image)]


def block_kvutils(case: Case) -> torch.Tensor:
    inputs = case.mlm.processor(images=case.photos[:1], text=[case.mlm.prompt(case.questions[0])], return_tensors="pt").to(case.mlm.device)
    slots = (inputs["input_ids"][0] == case.mlm.image_token_id).nonzero().flatten()
    with torch.no_grad(), kv.block_keys(case.mlm, kv.KeySelection("some", case.mask, case.layers), slots):
        return case.mlm.model(**inputs, logits_to_keep=1).logits[0, -1]


def block_hooks(case: Case) -> torch.Tensor:
    inputs = case.mlm.processor(images=case.photos[:1], text=[case.mlm.prompt(case.questions[0])], return_tensors="pt").to(case.mlm.device)
    layers, hooks = case.mlm.model.model.language_model.layers, []
    for layer, mask in zip(case.layers, case.mask, strict=True):
        def hook(module, args, kwargs, mask=mask):
            return args, kwargs | {"attention_mask": additive_mask(case, inputs, mask)}
        hooks.append(layers[layer].self_attn.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        with torch.no_grad():
            return case.mlm.model(**inputs, logits_to_keep=1).logits[0, -1]
    finally:
        for each in hooks:
            each.remove()


def block_nnsight(case: Case) -> torch.Tensor:
    inputs = case.mlm.processor(images=case.photos[:1], text=[case.mlm.prompt(case.questions[0])], return_tensors="pt").to(case.mlm.device)
    with torch.no_grad(), case.traced.trace(**inputs, logits_to_keep=1):
        for layer, mask in zip(case.layers, case.mask, strict=True):
            attention = case.traced.model.language_model.layers[layer].self_attn
            args, kwargs = attention.inputs
            attention.inputs = (args, {**kwargs, "attention_mask": additive_mask(case, inputs, mask)})
        logits = case.traced.output.logits[0, -1].save()
    return logits


def additive_mask(case: Case, inputs, mask: torch.Tensor) -> torch.Tensor:
    """(1, H, T, T): causal, and in rows after the image without the keys of mask (G, N)."""
    slots = (inputs["input_ids"][0] == case.mlm.image_token_id).nonzero().flatten()
    length, lowest = inputs["input_ids"].shape[1], torch.finfo(case.mlm.dtype).min
    blocked = torch.zeros(case.mlm.num_heads, length, dtype=torch.bool, device=case.mlm.device)
    blocked[:, slots] = mask.to(blocked.device).repeat_interleave(case.mlm.num_heads // case.mlm.num_kv_heads, dim=0)
    full = torch.full((length, length), lowest, dtype=case.mlm.dtype, device=case.mlm.device).triu(1).repeat(case.mlm.num_heads, 1, 1)
    full[:, slots.max() + 1 :].masked_fill_(blocked[:, None], lowest)
    return full[None]


def ask_kvutils(case: Case) -> list[str]:
    with kv.ImageSession(case.mlm, case.photos[0]) as session:
        return [answer.text for answer in session.ask(case.questions, max_new_tokens=NEW_TOKENS)]


def ask_generate(case: Case) -> list[str]:
    answers, tokenizer = [], case.mlm.tokenizer
    for question in case.questions:
        inputs = case.mlm.processor(images=case.photos[:1], text=[case.mlm.prompt(question)], return_tensors="pt").to(case.mlm.device)
        tokens = case.mlm.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(tokens, skip_special_tokens=True).strip())
    return answers


def ask_copied_cache(case: Case) -> list[str]:
    answers, tokenizer, token = [], case.mlm.tokenizer, case.mlm.processor.image_token
    before = case.mlm.prompt(case.questions[0]).partition(token)[0] + token
    inputs = case.mlm.processor(images=case.photos[:1], text=[before], return_tensors="pt").to(case.mlm.device)
    with torch.no_grad():
        cache = case.mlm.model.model(**inputs, past_key_values=DynamicCache()).past_key_values
    for question in case.questions:
        behind = tokenizer(case.mlm.prompt(question).partition(token)[2], add_special_tokens=False, return_tensors="pt")["input_ids"]
        ids = torch.cat([inputs["input_ids"], behind.to(case.mlm.device)], dim=1)
        found = case.mlm.model.generate(input_ids=ids, past_key_values=copy.deepcopy(cache), max_new_tokens=NEW_TOKENS, do_sample=False)
        answers.append(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return answers


def nnsight_body(model: torch.nn.Module, tokenizer):
    """Without the output head, which keys and values do not need."""
    from nnsight import NNsight
    return NNsight(model.model)


def nnsight_whole(model: torch.nn.Module, tokenizer):
    from nnsight import NNsight
    return NNsight(model)


def nnterp_whole(model: torch.nn.Module, tokenizer):
    from nnterp import StandardizedTransformer
    return StandardizedTransformer(model, tokenizer=tokenizer)


@dataclasses.dataclass
class Way:
    """run(case), the functions that it consists of, and what wraps the model for it."""

    run: Callable
    also: tuple[Callable, ...] = ()
    wrap: Callable | None = None

    def ready(self, case: Case) -> Case:
        """The case with a copy of the model that the peer has wrapped, if one is needed."""
        return dataclasses.replace(case, traced=self.wrap(copy.deepcopy(case.mlm.model), case.mlm.tokenizer)) if self.wrap else case

    @property
    def lines(self) -> int:
        return sum(map(lines_of, (self.run, *self.also)))


TASKS: dict[str, dict[str, Way]] = {
    "keys and values": {
        "kvutils": Way(keys_kvutils), "DynamicCache": Way(keys_cache, (of_images,)),
        "DynamicCache + output_hidden_states": Way(keys_cache_and_states, (keys_cache, of_images)),
        "forward hooks": Way(keys_hooks, (of_images,)), "nnsight": Way(keys_nnsight, (of_images,), nnsight_body),
        "nnterp": Way(keys_nnterp, (of_images,), nnterp_whole),
    },
    "blocked keys": {"kvutils": Way(block_kvutils), "hooks, additive mask": Way(block_hooks, (additive_mask,)),
                     "nnsight": Way(block_nnsight, (additive_mask,), nnsight_whole)},
    "18 questions": {"kvutils": Way(ask_kvutils), "generate": Way(ask_generate), "generate, prefilled cache copied": Way(ask_copied_cache)},
}  # fmt: skip


def lines_of(function: Callable) -> int:
    """Lines of a function's body that are neither blank, comment, docstring nor import."""
    source = textwrap.dedent(inspect.getsource(function))
    body = ast.parse(source).body[0].body
    first = body[1 if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant) else 0].lineno
    lines = [line.strip() for line in source.splitlines()[first - 1 :]]
    return sum(bool(line) and not line.startswith(("#", "from ", "import ")) for line in lines)


def difference(found, expected) -> float | str:
    """The largest absolute difference of tensors; of texts, how many are the same."""
    if isinstance(expected, torch.Tensor):
        return float((found - expected).abs().max())
    if isinstance(expected[0], str):
        return f"{sum(a == b for a, b in zip(found, expected, strict=True))} of {len(expected)} the same"
    return max(difference(a, b) for each in zip(found, expected, strict=True) for a, b in zip(*each, strict=True))


def make_case(mlm: MLM, photos: list, questions: list[str]) -> Case:
    """With a random half of the image keys of each head in the last third of the layers."""
    layers = tuple(range(mlm.num_layers))[-(mlm.num_layers // 3) :]
    tokens = len(kv.capture(mlm, photos[:1], layers=0)[0].layout)
    mask = torch.rand(len(layers), mlm.num_kv_heads, tokens, generator=torch.Generator().manual_seed(0)) < 0.5
    return Case(mlm, photos, questions, layers, mask)


def load(name: str) -> Case:
    """Generated scenes of 640x480 pixels: four for the pocket model, shown with its tile as `transformers` does, one for the large one."""
    photos = [one.image.resize((640, 480)) for one in kv.open_dataset("pocket-coco", count=4)]
    questions = [f"is there a {colour} {shape} ?" for colour in ("red", "green", "blue") for shape in CLASSES[:6]]
    if name == "pocket":
        return make_case(dataclasses.replace(kv.load_mlm("pocket", "cpu"), base_view_only=False), photos, questions)
    return make_case(random_mlm(MODELS[name], "cpu", torch.float32, small=True), photos[:1], questions)


def measure(task: str, name: str, ways: list[str]) -> dict[str, dict]:
    """{way: seconds, and how its result differs from that of kvutils, or the message with which it fails}, all in this process."""
    torch.set_num_threads(1)
    case, cases, found, results = load(name), {}, {}, {}
    for way in ways:
        try:
            cases[way] = TASKS[task][way].ready(case)
            TASKS[task][way].run(dataclasses.replace(cases[way], questions=case.questions[:1]))  # warms up
            found[way] = {"seconds": []}
        except Exception as error:  # whatever a peer raises is what is told about it
            if way == "kvutils":
                raise
            found[way] = {"message": f"{type(error).__name__}: {error}"}
    able = [way for way in ways if "seconds" in found[way]]
    for repeat in range(30 if name == "pocket" else 2 if task == "18 questions" else 6):
        for way in able if repeat % 2 else able[::-1]:
            start = time.process_time()
            results[way] = TASKS[task][way].run(cases[way])
            found[way]["seconds"].append(time.process_time() - start)
    for way in able:
        found[way] = {"seconds": statistics.median(found[way]["seconds"]), "difference": difference(results[way], results["kvutils"])}
    return found


def memory(task: str, name: str, way: str) -> float | None:
    """MiB of resident memory at its highest, above that of this process before, in one run; None where the system is not Linux."""
    torch.set_num_threads(1)
    case = TASKS[task][way].ready(load(name))
    case.questions = case.questions[:2]
    if not (status := Path("/proc/self/status")).exists():
        return None
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far becomes what it is now
    TASKS[task][way].run(case)
    highest = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return (highest * 1024 - before) / 2**20


def environment(name: str) -> Path:
    """The Python that has a peer on top of the packages of this one, which stay as they are; made where it is missing or outdated."""
    requirements, folder = FOLDER / ENVIRONMENTS[name], VENV / name
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    if not stamp.exists() or stamp.read_text() != requirements.read_text():
        print(f"installing {requirements.name} into {folder} ...", file=sys.stderr, flush=True)
        venv.create(folder, clear=True, with_pip=True)
        own = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], check=True, capture_output=True, text=True)
        shared = [path for path in sys.path if path.endswith("-packages")]  # torch may be the system's
        (Path(own.stdout.strip()) / "first.pth").write_text("\n".join(shared) + "\n")
        subprocess.run([python, "-m", "pip", "install", "-q", "-r", requirements], check=True)
        stamp.write_text(requirements.read_text())
    return python


def apart(python: Path, *arguments: str) -> object:
    """What `main` prints last in a process of its own."""
    print(*arguments, file=sys.stderr, flush=True)
    command = [python, "-W", "ignore", FOLDER, "peers", *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def version_in(python: Path, package: str) -> str:
    code = f"import importlib.metadata; print(importlib.metadata.version({package!r}))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def run() -> dict:
    """All figures of peers.json."""
    pythons = {name: environment(name) for name in ENVIRONMENTS}
    versions = {name: version_in(pythons["nnsight"], name) for name in ("torch", "transformers", "nnsight", "nnterp")}
    versions |= {"kvutils": kv.__version__, "nnsight for nnterp": version_in(pythons["nnterp"], "nnsight")}
    found = {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), "machine": describe_machine(), "versions": versions,
             "messages": {}, "tasks": {task: {way: {"lines": each.lines} for way, each in ways.items()} for task, ways in TASKS.items()}}
    for name in MODELS:
        for task, ways in TASKS.items():
            figures = apart(pythons["nnsight"], "measure", name, task, *ways)
            pairs = {way: (each, figures["kvutils"], pythons["nnsight"]) for way, each in figures.items()}
            for way in [way for way, each in figures.items() if "message" in each and way in ENVIRONMENTS]:  # beside older versions
                found["messages"][way] = figures[way]["message"]
                again = apart(pythons[way], "measure", name, task, "kvutils", way)
                pairs[way] = (again[way], again["kvutils"], pythons[way])
            for way, (each, ours, python) in pairs.items():
                if "seconds" in each:
                    each["ratio"] = each["seconds"] / ours["seconds"]
                    if name == "large":
                        each["memory_mib"] = apart(python, "memory", name, task, way)
                found["tasks"][task][way][name] = each
    return found


def table(found: dict) -> str:
    """README's table, and what stands below it."""
    lines = []
    for task, ways in TASKS.items():
        for way, each in ((way, found["tasks"][task][way]) for way in ways):
            cells = [f"{one['seconds']:#.3g} ({one['ratio']:.2f})" if "seconds" in one else "–" for one in map(each.get, MODELS)]
            large = each["large"]
            peak = f"{large['memory_mib']:.0f}" if large.get("memory_mib") is not None else "–"
            same = large.get("difference", large.get("message"))
            same = "–" if way == "kvutils" else same if isinstance(same, str) else f"{max(same, each['pocket']['difference']):.1g}"
            lines.append([task, f"**{way}**" if way == "kvutils" else way, each["lines"], *cells, peak, same])
    versions, machine = found["versions"], found["machine"]
    below = ("OneVision-0.5B: random and narrow, with its 24 layers and 2,929 image tokens; peak: of resident memory, above the loaded model. "
             f"{found['date']}, {machine['cpu']}, CPU seconds on one thread (÷ kvutils in the same process); torch {versions['torch']}, transformers "
             f"{versions['transformers']}, nnsight {versions['nnsight']}, nnterp {versions['nnterp']}.")
    for way, message in found["messages"].items():
        below += f" {way} {versions[way]} with nnsight {versions['nnsight']}: `{message}`; measured with nnsight {versions['nnsight for nnterp']}."
    header = ("task", "with", "lines", "pocket model, s", "OneVision-0.5B, s", "its peak, MiB", "difference")
    return f"{markdown_table(header, lines)}\n\n{below}"


def main(arguments: list[str]) -> None:
    """Without arguments the whole; `measure MODEL TASK WAY...` and `memory MODEL TASK WAY` are the parts that it runs apart."""
    parser = argparse.ArgumentParser(description="kvutils beside nnsight, nnterp and transformers alone.")
    parser.add_argument("part", nargs="*", help=argparse.SUPPRESS)
    part = parser.parse_args(arguments).part
    if part:
        what, name, task, *ways = part
        print(json.dumps(measure(task, name, ways) if what == "measure" else memory(task, name, *ways)))
        return
    write_text(RESULTS, to_json(run(), digits=4))
    shown = table(read_json(RESULTS))  # of the rounded figures, as anyone makes it again
    write_text(README, fill(README.read_text(encoding="utf-8"), "peers", shown))
    print(shown)


if __name__ == "__main__":
    main(sys.argv[1:])

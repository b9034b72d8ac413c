"""Writes docs/benchmarks.md from the JSON files under benchmarks/results: python benchmarks/write_docs.py"""

import json
import statistics
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
INTRO = """# Benchmarks

Written by `benchmarks/write_docs.py` from the JSON files under `benchmarks/results/`; nothing here was typed by hand.
Kernels have [a page of their own](kernels.md).
"""


def load(name: str) -> dict[str, Any] | None:
    path = RESULTS / name
    return json.loads(path.read_text()) if path.is_file() else None


def measured_with(about: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    return f"*{about['device']}; {versions}; commit {about['commit'][:10]}.*"


def table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def target_table(seeds: list[dict[str, Any]]) -> str:
    """A row per figure: its target, and what each seed gave."""
    header = ["figure", "target", *(f"seed {s['seed']}" for s in seeds), "met"]
    rows = []
    for name, first in seeds[0]["targets"].items():
        found = [s["targets"][name] for s in seeds]
        met = sum(f["met"] for f in found)
        rows.append([name, first["target"], *(f"{f['value']:.4g}" for f in found), f"{met} of {len(found)}"])
    return table(header, rows)


def quickstart() -> str:
    result = load("quickstart.json")
    if result is None:
        return ""
    return "\n\n".join(
        [
            "## Quickstart",
            "`python benchmarks/bench_quickstart.py` runs `configs/quickstart/chain.yaml`, once per seed.",
            target_table(result["seeds"]),
            measured_with(result["about"]),
        ]
    )


def sentiment() -> str:
    parts = ["## A pretrained storyteller made happier"]
    parts.append(
        "`python benchmarks/bench_sentiment_chain.py --data PATH`: a pretrained model of 260 thousand parameters, "
        "VADER sentiment of the answer as the gold score, everything through the command line and `configs/sentiment/`."
    )
    if chain := load("sentiment/chain.json"):
        parts += ["### SFT, reward model, PPO", target_table(chain["seeds"])]
        rows = []
        for s in chain["seeds"]:
            for name, f in s["figures"].items():
                cells = [f"{f[k]:.3f}" for k in ("gold", "reward_model", "kl", "entropy", "distinct_2")]
                rows.append([s["seed"], name, *cells])
        parts.append(table(["seed", "model", "gold", "reward model", "KL to SFT", "entropy", "distinct-2"], rows))
        parts += ["![PPO on a learnt reward](../benchmarks/results/sentiment/chain.png)", measured_with(chain["about"])]
    if frontier := load("sentiment/frontier.json"):
        parts.append("### Gold against KL")
        parts.append(
            "PPO straight on the gold score. No policy can lie above the oracle: the optimum of gold − β·KL, prompt by "
            "prompt, from samples of the pretrained model. A point above it would mean a wrong KL. "
            f"All points below: **{'yes' if frontier['all_below'] else 'no'}**."
        )
        rows = [
            [
                p["seed"],
                p["run"].removeprefix("coef_").replace("_", "."),
                *(f"{p[k]:.3f}" for k in ("gold", "kl", "oracle_gold")),
                "yes" if p["below"] else "no",
            ]
            for p in frontier["points"]
        ]
        parts.append(table(["seed", "β", "gold", "KL", "oracle at this KL", "below"], rows))
        parts.append("![Gold against KL](../benchmarks/results/sentiment/frontier.png)")
        parts.append(measured_with(frontier["about"]))
    if over := load("sentiment/overoptimisation.json"):
        parts.append("### Without KL: over-optimisation")
        parts.append(
            "The annotators dislike repetition, the reward model hardly learnt that, and PPO with β = 0 finds out: the "
            "proxy climbs, the gold score rises, then falls below where it began."
        )
        rows = [
            [s["seed"], *(f"{s['gold'][k]:.3f}" for k in ("first", "peak", "last"))]
            + [f"{s['proxy'][k]:.2f}" for k in ("first", "at_peak_of_gold", "last")]
            + [f"{s['kl'][k]:.1f}" for k in ("at_peak_of_gold", "last")]
            for s in over["seeds"]
        ]
        header = ["seed", "gold first", "gold peak", "gold last", "proxy first", "proxy at peak", "proxy last"]
        parts.append(table([*header, "KL at peak", "KL last"], rows))
        parts.append("![Over-optimisation](../benchmarks/results/sentiment/overoptimisation.png)")
        parts.append(measured_with(over["about"]))
    if hh := load("sentiment/hh.json"):
        parts.append("### Human preferences")
        if "held_out" in hh:
            held, report = hh["held_out"], hh["data_report"]
            count = report["val"]["kept"]
            error = (held["val/accuracy"] * (1 - held["val/accuracy"]) / count) ** 0.5
            parts.append(
                f"A reward model of the same size on {report['train']['kept']} pairs of hh-rlhf, "
                f"{report['train']['truncated']} of them cut to 256 tokens: held-out accuracy "
                f"**{held['val/accuracy']:.3f} ± {error:.3f}** over {count} pairs, calibration error "
                f"{held['val/ece']:.3f}, in {hh['seconds']:.0f} s. A model this small that has read only children's "
                "stories is expected at 0.50 to 0.58: this shows that real data goes through, no more."
            )
        parts.append(measured_with(hh["about"]))
    return "\n\n".join(parts)


def speed() -> list[str]:
    """Processor time alone, of fewer runs or later ones."""
    parts = []
    for name, what in (
        ("speed", "GRPO and RLOO, our reading of the prompts counted"),
        (
            "speed_dpo",
            "DPO, from the first step to the last on both sides; `dpo_share_prompts` has `share_prompts: true` on our "
            "side (16 of 49 tokens of a row are prompt), which TRL has nothing like",
        ),
        (
            "speed_long_prompts",
            "prompts of {prompt_tokens} tokens in place of 15, before answers of 32, as real prompts are often longer "
            "than their answers",
        ),
    ):
        result = load(f"sentiment/{name}.json")
        if result is None:
            continue
        what = what.format(**result)
        rows = [
            [r["algorithm"], r["seed"], f"{r['ours']:.0f}", f"{r['trl']:.0f}", f"{r['ratio']:.2f}"]
            for r in result["runs"]
        ]
        parts += [
            f"Measured again for speed alone, by processor time (`--speed`), at a load average of "
            f"{result['load_average']:.0f} on {result['cores']} cores: {what}.",
            table(["algorithm", "seed", "tokens per processor second, ours", "TRL", "ours : TRL"], rows),
            measured_with(result["about"]),
        ]
    return parts


def family() -> str:
    result = load("sentiment/family.json")
    if result is None:
        return ""
    order = result["dpo_in_file_order"]
    rows = [
        [
            p["seed"],
            p["library"],
            p["algorithm"],
            p["coef"],
            *(f"{p[k]:.3f}" for k in ("gold", "kl", "oracle_gold")),
            "yes" if p["below"] else "no",
            *(f"{p[k]:.0f}" if k in p else "" for k in ("tokens_per_second", "peak_mb")),
        ]
        for p in result["points"]
    ]
    against = [
        [
            row["algorithm"],
            *(f"{row['short_of_oracle'][library]:.3f}" for library in ("ours", "trl")),
            f"{row['difference']:+.4f} ± {row['standard_error']:.4f}",
            len(row["seeds"]),
            "yes" if row["not_below_trl"] else "no",
            f"{row['speed_ratio']:.2f}",
            f"{row['speed_ratio_by_processor_time']:.2f}",
            *(f"{row['peak_mb'][library]:.0f}" for library in ("ours", "trl")),
        ]
        for row in result["against_trl"]
    ]

    def kl_of(library: str) -> float:
        return statistics.fmean(
            p["kl"] for p in result["points"] if (p["algorithm"], p["library"]) == ("grpo", library)
        )

    header = ["algorithm", "ours short of oracle", "TRL short of oracle", "difference", "seeds", "not below TRL"]
    header += ["tokens per second, ours : TRL", "per processor second", "peak MB, ours", "peak MB, TRL"]
    return "\n\n".join(
        [
            "## GRPO, RLOO, PPO, DPO, and TRL beside them",
            "`python benchmarks/bench_sentiment_frontier.py --data PATH`: the same storyteller, prompts, pairs, seeds, "
            "optimiser and number of steps for both, one process per run. Targets: no point above the oracle, "
            "ours no further from it than TRL's beyond one standard error, 1.5 times TRL's tokens per second and never "
            f"slower. All points below the oracle: **{'yes' if result['all_below'] else 'no'}**.",
            "The difference is ours minus TRL's seed by seed, with the standard error of its mean; lower is better. Of "
            "the two ratios of speed, medians over the seeds, the first is by the clock and so tells what else the "
            "machine did meanwhile too; the second, by the processor time of the two processes, hardly does. Both are "
            "taken from the first step to the last.",
            table(header, against),
            f"GRPO's policies end at KL {kl_of('ours'):.2f} ours and {kl_of('trl'):.2f} TRL's. Both weigh the KL term "
            "by the ratio of policies (TRL's `use_bias_correction_kl`, our `kl.loss_importance_weighted`, both on by "
            "default), without which the same coefficient holds a policy less. On fixed rollouts twenty optimiser "
            "steps of the two are the same (`tests/peers`).",
            "With the pairs in one order for both, DPO's two policies end up "
            f"{100 * order['apart'] / order['trl_moved']:.1f} % of the way apart that they moved: what differs between "
            "them in the table is the order in which each library shuffles.",
            *speed(),
            "![Gold against KL, by algorithm and library](../benchmarks/results/sentiment/family.png)",
            table(
                [
                    "seed",
                    "library",
                    "algorithm",
                    "β",
                    "gold",
                    "KL",
                    "oracle at this KL",
                    "below",
                    "tokens/s",
                    "peak MB",
                ],
                rows,
            ),
            measured_with(result["about"]),
        ]
    )


def verifiers() -> str:
    result = load("verifiers.json")
    if result is None:
        return ""
    math, code = result["gsm8k"], result["humaneval"]
    alone = math["math_verify_alone"]
    rows = [[n, f["target"], f"{f['value']:.4g}", "yes" if f["met"] else "no"] for n, f in result["targets"].items()]
    return "\n\n".join(
        [
            "## Verifiers",
            "`python benchmarks/bench_gsm8k_verifier.py --data PATH`: `MathAnswer` on the labelled solutions of four "
            f"models that GSM8K was published with ({math['solutions']}, {math['correct_by_label']} of them right), "
            "`CodeTests` on HumanEval's canonical solutions, whole and with a last line that returns None.",
            table(["figure", "target", "measured", "met"], rows),
            f"A verdict on an answer takes **{math['ms_per_answer']:.2f} ms**; {math['unanswered']} solutions hold no "
            "answer. Nearly all are plain numbers, which need no process. math-verify in its processes, asked about "
            f"all {alone['pairs']} pairs, agrees with {alone['agreement']:.2%} of the labels and takes "
            f"{alone['ms_per_answer']:.1f} ms each. A program and its tests, in two sandboxes of their own, take "
            f"**{code['canonical']['ms_per_program']:.0f} ms** (two at a time).",
            measured_with(result["about"]),
        ]
    )


def time_table(seeds: list[dict[str, Any]]) -> str:
    """Where the seconds of GRPO went."""
    names = list(seeds[0]["grpo_seconds"])
    rows = [
        [s["seed"], *(f"{s['grpo_seconds'][n]:.1f}" for n in names), f"{s['processor_seconds']:.0f}"] for s in seeds
    ]
    return table(["seed", *names, "the whole chain, processor"], rows)


def random_walks() -> str:
    result = load("random_walks.json")
    if result is None:
        return ""
    seeds = result["seeds"]
    rows = [[s["seed"], *(f"{v:.3f}" for v in (s["data"], *s["optimality"].values()))] for s in seeds]
    return "\n\n".join(
        [
            "## Shortest paths from random walks",
            "`python benchmarks/bench_random_walks.py` runs `configs/random_walks/chain.yaml`, once per seed: a model "
            "of 834 thousand parameters imitates 1000 random walks on a graph of 21 nodes, then 40 steps of GRPO (16 "
            "starts × 8 walks) on how short its own are. A small version is a test.",
            target_table(seeds),
            table(["seed", "the walks imitated", "SFT", "GRPO"], rows),
            'Seconds of GRPO; "all else" is mostly its optimiser steps:',
            time_table(seeds),
            "![Optimality by step](../benchmarks/results/random_walks.png)",
            measured_with(result["about"]),
        ]
    )


def distillation() -> str:
    result = load("distillation.json")
    if result is None:
        return ""
    seeds, ways = result["seeds"], list(result["seeds"][0]["best"])
    parameters = result["parameters"]
    rows = []
    for what, key in (("negative log-likelihood", "student"), ("KL(teacher ‖ student)", "kl")):
        for seed in seeds:
            of_teacher = f"{seed['teacher']:.3f}" if key == "student" else "0"
            rows.append([what, seed["seed"], of_teacher, *(f"{seed['best'][way][key]:.3f}" for way in ways)])
    return "\n\n".join(
        [
            "## A storyteller's students",
            "`python benchmarks/bench_distillation.py --teacher PATH`: a pretrained model of "
            f"{parameters['teacher']:,} parameters writes {result['stories']} stories of {result['tokens']} tokens, "
            f"and students of {parameters['student']:,}, built anew, learn from them in {result['steps']} optimiser "
            "steps each: by likelihood, by either KL to the teacher over the vocabulary, and by GKD with half of the "
            "weight on their own continuations of the stories' first words. Per token of stories that none has seen, "
            "at the best of the evaluations (every other epoch):",
            table(["held out", "seed", "teacher", *ways], rows),
            "A reverse KL from nothing learns little here. A small version of the rest is a test.",
            measured_with(result["about"]),
        ]
    )


def arithmetic() -> str:
    result = load("arithmetic.json")
    if result is None:
        return ""
    seeds = result["seeds"]
    rows = []
    for how in ("sampled", "greedy"):
        rows += [[s["seed"], how, *(f"{s[how][name]:.3f}" for name in ("sft", "grpo", "control"))] for s in seeds]
    tokens = seeds[0]["answer_tokens"]
    return "\n\n".join(
        [
            "## Addition from a teacher who is wrong half the time",
            "`python benchmarks/bench_arithmetic.py` runs `configs/arithmetic/chain.yaml`, once per seed: a model of "
            "149 thousand parameters learns two-digit addition from demonstrations of which half are wrong, then 200 "
            "steps of GRPO (32 sums × 16 answers, learning rate 3e-4, no KL) on whether its own answers are right. The "
            "control is SFT from the same model, with as many steps, sequences and tokens "
            f"({tokens['control']:,} of answers; GRPO {tokens['grpo']:,}). All on 512 sums held out.",
            target_table(seeds),
            table(["seed", "answers", "SFT", "GRPO", "SFT on as many tokens"], rows),
            'Seconds of GRPO; "all else" is mostly its optimiser steps, and eight evaluations of 8192 answers:',
            time_table(seeds),
            "![Accuracy by step](../benchmarks/results/arithmetic.png)",
            measured_with(result["about"]),
        ]
    )


def faults() -> str:
    result = load("faults.json")
    if result is None:
        return ""
    figures = {name: section["figures"] for name, section in result["sections"].items()}
    parts = [
        "## Faults",
        "`python benchmarks/bench_faults.py`: what [reliability.md](reliability.md) promises, counted. Where something "
        "naive stands beside ours, the same faults catch it.",
    ]

    def of_each(name: str, first: str) -> None:
        header = [first, *next(iter(figures[name].values()))]
        parts.append(table(header, [[what, *found.values()] for what, found in figures[name].items()]))

    if "saves" in figures:
        parts.append("kill -9 at random moments of a process that saves checkpoints over and over (0.8 MB each):")
        of_each("saves", "saver")
    if "fits" in figures:
        parts.append(
            "kill -9 at random moments of `fit --resume auto`, one to three times a run: in how many runs are weights, "
            "optimiser with schedule, `samples.jsonl` and the export those of a run that nobody touched?"
        )
        of_each("fits", "stage")
    if "points" in figures:
        parts.append(
            "kill -9 at every failpoint that a stage comes to (those of rollouts and answers are not for all), at a "
            "random one of the times that it comes there, then `--resume auto`:"
        )
        of_each("points", "stage")
    if "ahead" in figures:
        parts.append(
            "The same with `updates.async_rollouts`, answers of up to 40 tokens on their way most of the time: kill -9 "
            "once at every place of the rollout loop, and at random moments, one to three times a run:"
        )
        of_each("ahead", "stage")
    for name, what in (
        ("corruptions", "Truncated and bit-flipped checkpoints"),
        ("full_disk", "A disk (tmpfs of 2 MB) without room for the next checkpoint"),
        ("malicious", "Checkpoints that run code when they are unpickled"),
    ):
        if name in figures:
            parts.append(f"{what}:")
            parts.append(table(list(figures[name]), [list(figures[name].values())]))
    if "signals" in figures:
        parts.append("Signals to one process of a run of two (DDP, gloo), which is then resumed:")
        of_each("signals", "signal")
    if "dead" in figures:
        parts.append(
            "One process of a run of two (FSDP2, gloo) is killed, is stopped for good, or raises an error, at a random "
            "step; then the run is resumed:"
        )
        of_each("dead", "fault")
    measured: dict[str, list[str]] = {}
    for section in result["sections"].values():
        measured.setdefault(measured_with(section["about"]), []).append(section["title"])
    parts += [f"{', '.join(titles)}: {about}" for about, titles in measured.items()]
    return "\n\n".join(parts)


def memory() -> str:
    result = load("memory.json")
    if result is None:
        return ""
    sections = result["sections"]

    def side_by_side(name: str, first: str) -> str:
        header = [first, *next(iter(sections[name].values()))]
        rows = [[f"`{what}`", *(f"{v:.3g}" for v in found.values())] for what, found in sections[name].items()]
        return table(header, rows)

    return "\n\n".join(
        (
            "## Memory",
            "`python benchmarks/bench_memory.py`: the options of [memory.md](memory.md), forward and backward pass of "
            "a Llama of 4 layers and 3.7 million parameters in float32; seconds of the processor, least of three. 16 "
            "records, 21 % of their padded rows (512 columns) real tokens:",
            side_by_side("records", "policy"),
            "Four pairs with prompts of 180 to 256 tokens and answers of 20 to 90:",
            side_by_side("pairs", "DPO"),
            side_by_side("weights", "format"),
            side_by_side("optimisers", "optimiser"),
            measured_with(result["about"]),
        )
    )


def planned() -> str:
    ways = {
        "plan.json": "`python benchmarks/bench_plan.py`: what [`rlhf-lightning plan`](plan.md) predicts, and how far "
        "resident memory of a run rises above that of a process that has trained a tiny model before.",
        "plan_cuda.json": "`python benchmarks/bench_plan.py --device cuda`: the same on a GPU in bf16-mixed, by "
        "`torch.cuda.max_memory_allocated`.",
    }
    sections = [plan_section(said, result) for name, said in ways.items() if (result := load(name)) is not None]
    return "\n\n".join(["## Memory, planned and measured", *sections]) if sections else ""


def plan_section(said: str, result: dict[str, Any]) -> str:
    rows = [
        [r["case"], r["phase"], f"{r['predicted_mb']:.0f}", f"{r['measured_mb']:.0f}", f"{r['error']:+.1%}"]
        for r in result["rows"]
    ]
    missing = f" Not measured: {', '.join(result['missing'])}." if result.get("missing") else ""
    return "\n\n".join(
        [
            f"{said} Random models of {result['parameters']} million parameters. Target: within "
            f"{result['target']:.0%}, met by **{result['met']} of {len(rows)}**.{missing}",
            table(["run", "phase", "predicted MB", "measured MB", "error"], rows),
            measured_with(result["about"]),
        ]
    )


def handover() -> str:
    result = load("handover.json")
    if result is None:
        return ""
    figures = ("MB of an update", "ms of an update", "ms of the first", "ms of sampling")
    rows = [
        [f"{r['parameters'] / 1e6:.3g}", r["engine"], r["adapter"], *(f"{r[name]:.3g}" for name in figures)]
        for r in result["rows"]
    ]
    return "\n\n".join(
        [
            "## Hand-over to vLLM",
            f"`make bench-vllm`: a policy with an adapter of rank {result['rank']} on every linear layer goes to vLLM "
            "in process and to a server on the same machine, by the [option](engines.md#adapters) `adapter`. MB "
            "of the tensors that are handed over; milliseconds by the clock, least of five updates; the first "
            "hand-over of `sent` holds the weights too; sampling is 8 answers of 32 tokens to one prompt, least "
            "of three. Compare times by "
            "factors, not by percents: other work ran beside.",
            table(["million parameters", "engine", "adapter", *figures], rows),
            f"{measured_with(result['about'])} *{result['conditions']}.*",
        ]
    )


def main() -> None:
    sections = (quickstart(), random_walks(), arithmetic(), sentiment(), family(), verifiers(), faults(), memory())
    sections += (planned(), handover(), distillation())
    parts = (INTRO, *(part for section in sections for part in (section, "")))
    page = "\n".join(part for part in parts if part is not None).rstrip() + "\n"
    (HERE.parent / "docs" / "benchmarks.md").write_text(page)
    print("wrote docs/benchmarks.md")


if __name__ == "__main__":
    main()

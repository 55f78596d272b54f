"""Pages of the reference: public names, whose texts mkdocstrings takes from docstrings and types."""

from typing import NamedTuple


class Page(NamedTuple):
    """A page of the reference."""

    title: str
    intro: str
    names: dict[str, tuple[str, ...]]  # module -> public names


PAGES = {
    "reference/parity.md": Page(
        "parity",
        "`import parity` imports neither torch nor JAX. The guide is [Check a port](../parity/check.md).",
        {
            "parity": (
                "check",
                "suggest",
                "Function",
                "Report",
                "write",
                "sweep",
                "trajectory",
                "Optimizer",
                "invariances",
                "record",
                "replay",
            ),
            "parity.compare.suggest": ("Suggestion",),
            "parity.locate.tree": ("Divergence",),
            "parity.report.results": ("Check", "Sweep", "Trajectory"),
        },
    ),
    "reference/models.md": Page(
        "Models",
        "Flax NNX modules. Each has a PyTorch twin of the same name, arguments and attributes in `torch_ref`. Modules "
        "hold parameters only: random keys and caches are arguments of the call, and `rng=None` switches dropout off.",
        {
            "jaxmodels.rope": (
                "RotaryPositionalEmbeddings",
                "RotaryPEMultiHeadAttention",
                "RotaryValuePEMultiHeadAttention",
            ),
            "jaxmodels.transformer": (
                "MultiHeadAttention",
                "RelativeMultiHeadAttention",
                "TransformerLayer",
                "Encoder",
                "AutoregressiveTransformer",
            ),
            "jaxmodels.synthesizer": ("DenseSynthesizer", "SynthesizerAttention"),
            "jaxmodels.feedback": (
                "FeedbackAttention",
                "FeedbackTransformerLayer",
                "FeedbackTransformer",
                "FeedbackTransformerKV",
                "AutoregressiveModel",
            ),
            "jaxmodels.neox": ("NeoXConfig", "NeoX", "quantize"),
            "jaxmodels.retro": ("NearestNeighborEncoder", "RetroModel"),
        },
    ),
    "reference/checkpoints.md": Page(
        "Checkpoints",
        "Loading, saving and converting. The guides are [Convert a checkpoint](../guides/convert.md) and "
        "[Kinds of checkpoints](../guides/checkpoints.md).",
        {
            "jaxmodels": ("load", "save", "register"),
            "jaxmodels.convert": ("from_torch", "to_torch", "load_into_torch", "ConversionError"),
            "jaxmodels.convert.neox": ("load_neox", "save_neox"),
            "jaxmodels.convert.hf": ("load_hf", "save_hf"),
            "jaxmodels.convert.open": ("open_source", "Opened"),
            "jaxmodels.models": ("load_saved",),
        },
    ),
    "reference/generation.md": Page(
        "Generation and scoring",
        "Functions for every language model of this package and for classes with the members of `LanguageModel`. The "
        "guides are [Generate](../guides/generation.md) and [Score](../guides/scoring.md).",
        {
            "jaxmodels.generate": ("generate", "generate_many", "stream", "Sampling"),
            "jaxmodels.scoring": ("score", "Scores", "Score", "loglikelihood", "Likelihood"),
            "jaxmodels.protocols": ("LanguageModel", "ReadsMoreThanIds", "DividedReadout"),
        },
    ),
    "reference/training.md": Page(
        "Training",
        "Parts of an experiment of your own. The guide is [An experiment of your own](../guides/experiments.md).",
        {
            "jaxmodels.training.experiment": ("Experiment",),
            "jaxmodels.training.config": ("Config", "Options"),
            "jaxmodels.training.script": ("train", "run_script"),
            "jaxmodels.training.reporting.trackers": ("Tracker",),
            "jaxmodels.sharding": ("make_mesh", "shardings"),
        },
    ),
    "reference/retrieval.md": Page(
        "Retrieval",
        "The chunk index of RETRO. The guide is [RETRO and retrieval](../guides/retro.md).",
        {
            "jaxmodels.retro.retrieval": ("ChunkIndex",),
            "jaxmodels.retro.corpus": ("Corpus",),
            "jaxmodels.retro.sampling": ("Retriever", "Retrieving"),
        },
    ),
}


def public() -> dict[str, str]:
    """Full name of every documented object -> the page that documents it."""
    return {
        f"{module}.{name}": file
        for file, page in PAGES.items()
        for module, names in page.names.items()
        for name in names
    }


def page(file: str) -> str:
    """Markdown of a page of the reference."""
    title, intro, modules = PAGES[file]
    parts = [f"# {title}\n\n{intro}\n"]
    for module, names in modules.items():
        parts += [f"::: {module}.{name}\n" for name in names]
    return "\n".join(parts)

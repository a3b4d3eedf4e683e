"""`reir train`: whether a run makes progress, what it learns, and what it waits for."""

from __future__ import annotations

from reir_k8s.monitoring.dashboards.panels import JOB, RATE, Graph, Limit, Number, Page

_RUN = 'job=~"$job", run=~"$run"'


def _last(gauge: str, labels: str) -> str:
    # Ray exports a gauge for about 20 s after it was set; a run sets its gauges every ten steps.
    return f"max by ({labels}) (last_over_time({gauge}{{{_RUN}}}[15m]))"


_NOW = (
    Number(
        "Epoch",
        "Current epoch, counted from 1.",
        {"{{run}}": _last("ray_reir_train_epoch", "run")},
        is_instant=False,
    ),
    Number(
        "Loss",
        "Loss of the last reported step.",
        {"{{run}}": _last("ray_reir_train_loss", "run")},
        is_instant=False,
    ),
    Number(
        "Time of a step",
        "Mean since the last report.",
        {"{{run}}": _last("ray_reir_train_step_seconds", "run")},
        unit="s",
        is_instant=False,
    ),
    Number(
        "Photos processed",
        "By all workers, since the run started or resumed.",
        {"{{run}}": f"sum by (run) (ray_reir_train_photos_total{{{_RUN}}})"},
        is_instant=False,
    ),
)
_LEARNING = (
    Graph(
        "Loss",
        "A loss that grows, or that is missing because it is no number, means that the learning "
        "rate is too high.",
        {"{{run}}": _last("ray_reir_train_loss", "run")},
    ),
    Graph(
        "Terms of the loss",
        "Means over the epoch so far.",
        {"{{run}}, {{part}}": _last("ray_reir_train_loss_part", "run, part")},
    ),
    Graph(
        "Validation figures",
        "Figures of the last epoch. If they fall while the loss falls too, the model overfits.",
        {"{{run}}, {{figure}}": _last("ray_reir_train_held_out", "run, figure")},
    ),
    Graph(
        "Learning rate",
        "Highest one of the optimizer's parameter groups.",
        {"{{run}}": _last("ray_reir_train_learning_rate", "run")},
    ),
    Graph(
        "Photos",
        "Photos a second of all workers. None for longer than a validation takes means that the "
        "run has stalled.",
        {"{{run}}": f"sum by (run) (rate(ray_reir_train_photos_total{{{_RUN}}}{RATE}))"},
        unit="ops",
    ),
    Graph(
        "Time of a step",
        "Mean since the last report.",
        {"{{run}}": _last("ray_reir_train_step_seconds", "run")},
        unit="s",
    ),
)
_RAY = (
    Graph(
        "State of the run",
        "1 for the state that the controller of Ray Train is in. A run that restarts again and "
        "again loses workers.",
        {
            "{{ray_train_controller_state}}": "max by (ray_train_controller_state) "
            f"(last_over_time(ray_train_controller_state{{{JOB}}}[1d]))"
        },
    ),
    Graph(
        "Use of the GPUs, or of the CPUs of nodes without GPUs",
        "If it is low, the workers wait for photos.",
        {
            # `or` compares the labels, so each node without a GPU appears with its CPUs.
            "{{instance}}": f"avg by (instance) (ray_node_gpus_utilization{{{JOB}}})"
            f" or avg by (instance) (ray_node_cpu_utilization{{{JOB}}})"
        },
        unit="percent",
    ),
    Graph(
        "Use of the memory",
        "Of all nodes of the Ray cluster. Ray kills processes of a node whose memory is full.",
        {
            "{{instance}}": f"sum by (instance) (ray_node_mem_used{{{JOB}}})"
            f" / sum by (instance) (ray_node_mem_total{{{JOB}}})"
        },
        unit="percentunit",
        limit=Limit(0.95),
    ),
)

TRAINING = Page(
    name="training",
    title="REIR: training",
    description="Does a training run make progress, does it learn, and what does it wait for?",
    variables={"run": "ray_reir_train_loss"},
    rows={"Now": _NOW, "Learning": _LEARNING, "Ray": _RAY},
)

"""`reir train`: whether a run makes progress, what it learns, and what it waits for."""

from __future__ import annotations

from reir_k8s.monitoring.dashboards.panels import JOB, RATE, Graph, Limit, Number, Page

_RUN = 'job=~"$job", run=~"$run"'

_NOW = (
    Number(
        "Epoch",
        "Current epoch, counted from 1.",
        {"{{run}}": f"max by (run) (ray_reir_train_epoch{{{_RUN}}})"},
        is_instant=False,
    ),
    Number(
        "Loss",
        "Loss of the last reported step.",
        {"{{run}}": f"max by (run) (ray_reir_train_loss{{{_RUN}}})"},
        is_instant=False,
    ),
    Number(
        "Time of a step",
        "Mean since the last report.",
        {"{{run}}": f"max by (run) (ray_reir_train_step_seconds{{{_RUN}}})"},
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
        {"{{run}}": f"max by (run) (ray_reir_train_loss{{{_RUN}}})"},
    ),
    Graph(
        "Terms of the loss",
        "Means over the epoch so far.",
        {"{{run}}, {{part}}": f"max by (run, part) (ray_reir_train_loss_part{{{_RUN}}})"},
    ),
    Graph(
        "Validation figures",
        "Figures of the last epoch. If they fall while the loss falls too, the model overfits.",
        {"{{run}}, {{figure}}": f"max by (run, figure) (ray_reir_train_held_out{{{_RUN}}})"},
    ),
    Graph(
        "Learning rate",
        "Highest one of the optimizer's parameter groups.",
        {"{{run}}": f"max by (run) (ray_reir_train_learning_rate{{{_RUN}}})"},
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
        {"{{run}}": f"max by (run) (ray_reir_train_step_seconds{{{_RUN}}})"},
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
            f"(ray_train_controller_state{{{JOB}}})"
        },
    ),
    Graph(
        "Use of the GPUs, or of the CPUs of nodes without GPUs",
        "If it is low, the workers wait for photos.",
        {
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

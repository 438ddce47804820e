"""What is deployed: the board asks for metrics that the server has, and the files say what they should."""

import json
import re
from pathlib import Path

import yaml

from eellm.config.serve import ServeConfig
from eellm.serve.metrics import Meters

DEPLOY = Path(__file__).parents[2] / "deploy"


def test_the_board_s_queries_name_metrics_that_the_server_has():
    board = json.loads((DEPLOY / "grafana/dashboards/eellm.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    named = {name for query in queries for name in re.findall(r"eellm_\w+", query)}
    known = set()
    for metric in Meters().registry.collect():
        ends = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket"]}[metric.type]
        known |= {metric.name + end for end in ends}
    assert named == known, "every metric is on the board, and no other"
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_every_manifest_can_be_read_and_waits_for_the_drain():
    files = [*DEPLOY.rglob("*.yaml")]
    documents = {path: [*yaml.safe_load_all(path.read_text())] for path in files}
    assert len(files) == 5
    deployment = documents[DEPLOY / "kubernetes/eellm.yaml"][0]
    assert deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > ServeConfig().drain_s
    (compose,) = documents[DEPLOY / "compose.yaml"]
    assert float(compose["services"]["eellm"]["stop_grace_period"].removesuffix("s")) > ServeConfig().drain_s
    for service in compose["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists(), f"{source} is mounted"

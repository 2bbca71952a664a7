from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.cluster import nccl
from launcher.cluster.nccl import Setting
from launcher.cluster.spec import ClusterSpec, GpuSpec, Link, Tuned
from launcher.errors import ConfigError

CASES = yaml.safe_load((Path(__file__).parent / "data" / "nccl_settings.yaml").read_text())
CLUSTER = ClusterSpec(
    name="c",
    num_nodes=2,
    gpus_per_node=8,
    gpu=GpuSpec(name="G", memory_gib=80.0, memory_gb_per_s=3000.0, peak_tflops={"bf16": 900.0}),
    links=(Link(name="NDR InfiniBand", size=None, gb_per_s=50.0, latency_us=15.0),),
    host_memory_gib=1000.0,
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['fabric']}-{','.join(case['set'])}")
def test_a_public_setting_gets_the_verdict_of_the_documentation(case: dict[str, Any]) -> None:
    findings = nccl.lint(nccl.collect(case["set"], {}), case["fabric"])
    said = findings[0].verdict if findings else "nothing"
    assert said == case["says"], [finding.message for finding in findings]
    if findings:
        assert any(case["about"] in finding.message for finding in findings)
        assert all(finding.reference for finding in findings)


def test_there_are_enough_of_them_on_both_sides() -> None:
    named = [name for case in CASES for name in case["set"]]
    assert len(CASES) >= 50
    assert len(set(named)) >= 40
    assert {case["says"] for case in CASES} == {"refuse", "warn", "nothing"}


def test_the_environment_wins_over_files_and_each_tells_who_it_is() -> None:
    files = {
        "/home/me/.nccl.conf": "NCCL_DEBUG=INFO\n# a note\n NCCL_IB_SL = 3 # rail\n\nnonsense",
        "/etc/nccl.conf": "NCCL_IB_SL=5\nNCCL_NET=IB",
    }
    settings = nccl.collect({"NCCL_DEBUG": "WARN", "HOME": "/home/me"}, files)
    assert {name: (s.value, s.set_by) for name, s in settings.items()} == {
        "NCCL_DEBUG": ("WARN", "the environment"),
        "NCCL_IB_SL": ("3", "/home/me/.nccl.conf"),
        "NCCL_NET": ("IB", "/etc/nccl.conf"),
    }


def test_files_are_read_where_nccl_reads_them(tmp_path: Path) -> None:
    (tmp_path / "conf").write_text("NCCL_IB_SL=2\n")
    settings = nccl.look({"NCCL_CONF_FILE": str(tmp_path / "conf")})
    assert settings["NCCL_IB_SL"] == Setting(name="NCCL_IB_SL", value="2", set_by=str(tmp_path / "conf"))


def test_determinism_is_a_reason_for_ring() -> None:
    settings = nccl.collect({"NCCL_ALGO": "Ring"}, {})
    assert nccl.lint(settings, "infiniband")
    assert not nccl.lint(settings, "infiniband", deterministic=True)


def test_relaxed_ordering_is_excused_by_azures_file_only() -> None:
    settings = nccl.collect({"NCCL_IB_PCI_RELAXED_ORDERING": "1", "NCCL_TOPO_FILE": "/opt/mine.xml"}, {})
    assert [finding.setting.name for finding in nccl.lint(settings, "infiniband")] == [
        "NCCL_IB_PCI_RELAXED_ORDERING"
    ]


@pytest.mark.parametrize(
    ("link", "environ", "fabric"),
    [
        ("NDR InfiniBand", {}, "infiniband"),
        ("RoCE 400 Gb/s", {}, "roce"),
        ("EFA 3200", {}, "efa"),
        ("Ethernet", {"FI_PROVIDER": "efa"}, "tcp"),
        ("", {"FI_PROVIDER": "efa"}, "efa"),
        ("", {"NCCL_FASTRAK_NUM_FLOWS": "2"}, "gcp"),
        ("", {}, None),
    ],
)
def test_the_fabric_is_read_out_of_the_slowest_tier(
    link: str, environ: dict[str, str], fabric: str | None
) -> None:
    cluster = replace(CLUSTER, links=(replace(CLUSTER.links[0], name=link),))
    assert nccl.fabric_of(cluster, nccl.collect(environ, {})) == fabric


def test_a_named_fabric_wins() -> None:
    assert nccl.fabric_of(replace(CLUSTER, fabric="efa"), {}) == "efa"


def test_defaults_fill_only_what_nobody_has_said(tmp_path: Path) -> None:
    environ = {"NCCL_CONF_FILE": str(tmp_path / "none")}
    nccl.fill(environ, replace(CLUSTER, fabric="roce"))
    assert environ["NCCL_DEBUG"] == "WARN"
    assert environ["NCCL_IB_ROCE_VERSION_NUM"] == "2"
    (tmp_path / "conf").write_text("NCCL_DEBUG=VERSION\n")
    environ = {"NCCL_CONF_FILE": str(tmp_path / "conf")}
    nccl.fill(environ, replace(CLUSTER, fabric="infiniband"))
    assert list(environ) == ["NCCL_CONF_FILE"]


def test_what_a_trial_has_found_is_set_with_its_source_and_never_over_what_somebody_says() -> None:
    found = Tuned(
        **{"date": "2026-01-02", "host": "n0", "speedup": 1.07, "p": 0.002, "rounds": 10},
        environment={"NCCL_ALGO": "Tree", "NCCL_PROTO": "Simple"},
    )
    cluster = replace(CLUSTER, tuned=found)
    environ = {"NCCL_PROTO": "LL", "NCCL_CONF_FILE": "/none"}
    nccl.fill(environ, cluster)
    assert (environ["NCCL_ALGO"], environ["NCCL_PROTO"]) == ("Tree", "LL")
    kept = nccl.to_json(nccl.report(cluster))["defaults"]
    assert kept["NCCL_ALGO"] == ["Tree", "meshwright probe nccl on n0, 2026-01-02: 7.0% faster in 10 rounds"]
    on_processors = replace(cluster, gpu=replace(cluster.gpu, device="cpu"))
    assert list(nccl.to_json(nccl.report(on_processors))["defaults"]) == ["NCCL_ALGO", "NCCL_PROTO"]
    with pytest.raises(ValueError, match=r"cluster\.tuned\.environment=\{\} must hold a variable"):
        replace(found, environment={})


@pytest.mark.parametrize("fabric", ["infiniband", "roce", "efa", "gcp", "tcp", None])
def test_our_own_defaults_pass_our_own_check(fabric: Any) -> None:
    values = {default.name: default.value for default in nccl.defaults(fabric)}
    assert len(values) <= 2
    assert all(default.source for default in nccl.defaults(fabric))
    assert nccl.lint(nccl.collect(values, {}), fabric) == ()


def test_hosts_that_contradict_each_other_are_named() -> None:
    here = nccl.collect({"NCCL_IB_SL": "1", "NCCL_SOCKET_IFNAME": "eth0"}, {})
    there = nccl.collect({"NCCL_SOCKET_IFNAME": "eth1"}, {"/etc/nccl.conf": "NCCL_IB_SL=2"})
    (sentence,) = nccl.differences({"a": here, "b": there})
    assert "NCCL_IB_SL differs" in sentence
    assert "a: 1 by the environment, b: 2 by /etc/nccl.conf" in sentence
    assert nccl.differences({"a": here, "b": here}) == ()
    assert "b: unset" in nccl.differences({"a": here, "b": {}})[0]


def test_the_report_is_kept_and_its_worst_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    told = nccl.report(CLUSTER)
    assert "NCCL_DEBUG=INFO (set by the environment)" in nccl.warnings(told)[0]
    kept = nccl.to_json(told)
    assert kept["fabric"] == "infiniband"
    assert kept["inherited"]["NCCL_DEBUG"] == ["INFO", "the environment"]
    assert set(kept["defaults"]) == {"NCCL_DEBUG"}
    monkeypatch.setenv("NCCL_IB_TIMEOUT", "300")
    with pytest.raises(
        ConfigError, match=r"NCCL_IB_TIMEOUT=300 .set by the environment.: it has to be 0 to 31"
    ):
        nccl.warnings(nccl.report(CLUSTER))


def test_a_cluster_without_gpus_does_not_care(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_IB_TIMEOUT", "300")
    assert nccl.report(replace(CLUSTER, gpu=replace(CLUSTER.gpu, device="cpu"))).findings == ()


def test_the_verbs_refuse_and_warn(call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("plan", "model=llama3_8b", "cluster=h100_sxm", "strategy=megatron", "--json")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    warned = call(*words)
    assert warned.code == 0
    assert "NCCL_DEBUG=INFO" in warned.err
    monkeypatch.setenv("NCCL_IB_RETRY_CNT", "20")
    refused = call(*words)
    assert refused.code == 2
    assert "NCCL_IB_RETRY_CNT=20" in refused.err

"""Detection on recorded trees of /proc and /sys."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import machines
from helpers.machines import meminfo
from tokenplane_cpu.device import default_threads, detect, read_host, read_memory

GIB = 1 << 30


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def x86(cpus: int, flags: str = "fpu sse2 avx avx2", threads_per_core: int = 1, name: str = "Acme 9000") -> str:
    return "\n".join(
        f"processor\t: {i}\nmodel name\t: {name}\nphysical id\t: 0\n"
        f"core id\t\t: {i // threads_per_core}\nflags\t\t: {flags}\n"
        for i in range(cpus)
    )


def allowed(cpus: str) -> str:
    return f"Name:\tpython\nCpus_allowed:\tff\nCpus_allowed_list:\t{cpus}\n"


SAPPHIRE = "avx2 avx512f avx512_vnni avx512_bf16 amx_bf16 amx_tile amx_int8"


def test_a_server_cpu_is_described(tmp_path: Path) -> None:
    files = {
        "proc/cpuinfo": x86(8, SAPPHIRE, threads_per_core=2, name="Intel(R) Xeon(R) Platinum 8480+"),
        "proc/self/status": allowed("0-7"),
        "proc/meminfo": meminfo(64, 48),
    }
    report = detect(tree(tmp_path, files))
    (device,) = report.devices
    assert report.status == "found" and report.reason == ""
    assert (device.kind, device.index, device.score) == ("cpu", 0, 1)
    assert device.name == "Intel(R) Xeon(R) Platinum 8480+"
    assert device.arch.endswith("+avx2+avx512+avx512_vnni+avx512_bf16+amx_int8+amx_bf16")
    assert device.memory_total_bytes == 64 * GIB and device.memory_free_bytes == 48 * GIB
    assert device.dtypes == ("bfloat16", "float32", "float16")
    assert device.notes == "4 of 8 CPUs used, bfloat16 native"


def test_without_bfloat16_instructions_float32_is_preferred(tmp_path: Path) -> None:
    (device,) = detect(tree(tmp_path, {"proc/cpuinfo": x86(2), "proc/meminfo": meminfo(8, 4)})).devices
    assert device.dtypes == ("float32", "bfloat16", "float16")
    assert device.notes.endswith("bfloat16 emulated")


def test_an_arm_machine_without_a_model_name(tmp_path: Path) -> None:
    cpuinfo = "\n".join(
        f"processor\t: {i}\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd sve i8mm bf16\nCPU implementer\t: 0x41\n"
        for i in range(4)
    )
    host = read_host(tree(tmp_path, {"proc/cpuinfo": cpuinfo, "proc/self/status": allowed("0-3")}))
    assert host.isa == ("neon", "sve", "i8mm", "bf16")
    assert host.cores == 4 and host.name


@pytest.mark.parametrize(
    ("machine", "name", "arch"),
    [
        (machines.RASPBERRY, "Raspberry Pi 5 Model B Rev 1.0 (Arm Cortex-A76)", "aarch64+neon"),
        (machines.GRAVITON, "Arm Neoverse-V1", "aarch64+neon+sve+i8mm+bf16"),
    ],
)
def test_arm_machines_are_named_by_board_and_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: machines.Machine, name: str, arch: str
) -> None:
    (device,) = detect(machine.build(tmp_path, monkeypatch)).devices
    assert (device.name, device.arch) == (name, arch)


@pytest.mark.parametrize(
    ("cpus", "note"), [("0-7", "2 NUMA nodes"), ("0-3", "on NUMA node 0 of 2"), ("5", "on NUMA node 1 of 2")]
)
def test_memory_nodes_of_the_allowed_cpus_are_named(tmp_path: Path, cpus: str, note: str) -> None:
    files = {
        "proc/cpuinfo": x86(8),
        "proc/self/status": allowed(cpus),
        "sys/devices/system/node/node0/cpulist": "0-3\n",
        "sys/devices/system/node/node1/cpulist": "4-7\n",
    }
    assert note in detect(tree(tmp_path, files)).devices[0].notes


def test_a_memory_limit_is_told_with_what_the_machine_has(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": meminfo(64, 48),
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": f"{8 * GIB}\n",
    }
    assert "memory limited by cgroup (machine: 64.0 GiB)" in detect(tree(tmp_path, files)).devices[0].notes


@pytest.mark.parametrize(("cpus", "cores"), [("0-7", 8), ("0-1,6", 3), ("5", 1), ("0,2-3\n", 3)])
def test_only_cpus_of_the_affinity_mask_count(tmp_path: Path, cpus: str, cores: int) -> None:
    assert read_host(tree(tmp_path, {"proc/cpuinfo": x86(8), "proc/self/status": allowed(cpus)})).cores == cores


@pytest.mark.parametrize(("setting", "threads"), [(None, 8), ("2", 2), ("3,2", 3), ("many", 8), ("0", 8)])
def test_a_thread_per_core_unless_openmp_is_told_otherwise(tmp_path: Path, setting: str | None, threads: int) -> None:
    root = tree(tmp_path, {"proc/cpuinfo": x86(8), "proc/self/status": allowed("0-7")})
    assert default_threads(root, {} if setting is None else {"OMP_NUM_THREADS": setting}) == threads


def test_two_threads_of_a_core_count_once(tmp_path: Path) -> None:
    files = {"proc/cpuinfo": x86(8, threads_per_core=2), "proc/self/status": allowed("0-2")}
    host = read_host(tree(tmp_path, files))
    assert (host.cores, host.logical_cpus) == (2, 8)


@pytest.mark.parametrize(
    ("cpu_max", "cores"), [("max 100000", 8), ("300000 100000", 3), ("250000 100000", 2), ("50000 100000", 1)]
)
def test_a_cgroup_v2_quota_limits_the_cores(tmp_path: Path, cpu_max: str, cores: int) -> None:
    files = {
        "proc/cpuinfo": x86(8),
        "proc/self/status": allowed("0-7"),
        "proc/self/cgroup": "0::/user.slice/app.scope\n",
        "sys/fs/cgroup/user.slice/app.scope/cpu.max": "max 100000\n",
        "sys/fs/cgroup/user.slice/cpu.max": cpu_max + "\n",
    }
    assert read_host(tree(tmp_path, files)).cores == cores


def test_a_cgroup_v1_quota_limits_the_cores(tmp_path: Path) -> None:
    """In a container the path names a folder of the host that is not mounted: the mount point counts."""
    files = {
        "proc/cpuinfo": x86(8),
        "proc/self/status": allowed("0-7"),
        "proc/self/cgroup": "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n0::/\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
    }
    assert read_host(tree(tmp_path, files)).cores == 2


def test_a_cgroup_v1_without_quota_does_not(tmp_path: Path) -> None:
    files = {
        "proc/cpuinfo": x86(8),
        "proc/self/cgroup": "4:cpu:/\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    }
    assert read_host(tree(tmp_path, files)).cores == 8


def test_the_tightest_cgroup_v2_limit_is_the_memory(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": meminfo(64, 48),
        "proc/self/cgroup": "0::/outer/inner\n",
        "sys/fs/cgroup/outer/inner/memory.max": "max\n",
        "sys/fs/cgroup/outer/inner/memory.current": f"{2 * GIB}\n",
        "sys/fs/cgroup/outer/memory.max": f"{8 * GIB}\n",
        "sys/fs/cgroup/outer/memory.current": f"{5 * GIB}\n",
        "sys/fs/cgroup/outer/memory.stat": f"anon {GIB}\ninactive_file {1 * GIB}\nactive_file 7\n",
    }
    memory = read_memory(tree(tmp_path, files))
    assert memory.total_bytes == 8 * GIB
    assert memory.free_bytes == 4 * GIB  # file cache that can be dropped is not in use


def test_a_cgroup_v1_limit_is_the_memory(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": meminfo(64, 48),
        "proc/self/cgroup": "4:memory:/docker/abc\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{4 * GIB}\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{3 * GIB}\n",
        "sys/fs/cgroup/memory/memory.stat": f"inactive_file 0\ntotal_inactive_file {2 * GIB}\n",
    }
    memory = read_memory(tree(tmp_path, files))
    assert (memory.total_bytes, memory.free_bytes) == (4 * GIB, 3 * GIB)


def test_an_unlimited_cgroup_v1_changes_nothing(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": meminfo(64, 48),
        "proc/self/cgroup": "4:memory:/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{3 * GIB}\n",
    }
    memory = read_memory(tree(tmp_path, files))
    assert (memory.total_bytes, memory.free_bytes) == (64 * GIB, 48 * GIB)


def test_a_limit_already_exceeded_leaves_nothing_free(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": meminfo(64, 48),
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": f"{GIB}\n",
        "sys/fs/cgroup/memory.current": f"{2 * GIB}\n",
    }
    assert read_memory(tree(tmp_path, files)).free_bytes == 0


def test_without_proc_and_sys_there_is_still_a_cpu(tmp_path: Path) -> None:
    """macOS and Windows have neither."""
    (device,) = detect(tmp_path).devices
    assert device.name and device.arch and read_host(tmp_path).cores >= 1


def test_damaged_files_are_no_crash(tmp_path: Path) -> None:
    files = {
        "proc/cpuinfo": "processor : x\nno colon here\n: :\n",
        "proc/self/status": allowed("what"),
        "proc/self/cgroup": "0::/../..\n",
        "proc/meminfo": "MemTotal:\nnonsense\nMemAvailable: many kB\n",
        "sys/fs/cgroup/cpu.max": "fast\n",
        "sys/fs/cgroup/memory.max": "much\n",
    }
    (device,) = detect(tree(tmp_path, files)).devices
    assert read_host(tmp_path).cores >= 1 and device.memory_total_bytes >= 0


def test_this_machine_is_found() -> None:
    (device,) = detect().devices
    assert device.memory_free_bytes is not None
    assert 0 < device.memory_free_bytes <= device.memory_total_bytes

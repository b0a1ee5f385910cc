#!/usr/bin/env bash
# What the statistics of 100 real containers cost: Docker's stream, metad's cgroup source asked each
# second and not asked at all, in one run; and what 1,000 made-up containers cost. Takes about eight
# minutes; needs root. STATS_CONTAINERS and STATS_SECONDS make it shorter.
set -euo pipefail
cd "$(dirname "$0")/.."
go test -tags root -run '^$' -bench '^BenchmarkRootStats$' -benchtime 1x -timeout 30m ./pkg/stats | grep -v '^Benchmark'
go test -run '^$' -bench '^BenchmarkThousandContainers$' -benchtime 20x -timeout 10m ./pkg/stats | grep '^Benchmark'

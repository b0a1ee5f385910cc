# metad. `make help` lists the targets.
SHELL   := /bin/bash
export PATH := $(PATH):/usr/local/go/bin:/usr/sbin:/sbin

VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
GOTEST  := go test -timeout 30m

DENSITY ?= 10x3 100x3 1000x3

.PHONY: build help generate generate-check test test-unit test-root test-prometheus screenshots test-kernels test-arm64 test-systemd test-self test-engines packages image release test-packages test-image test-release fuzz bench bench-density bench-stats docs lint check demo clean

build: ## bin/metad, static (the default)
	@scripts/install build
	CGO_ENABLED=0 go build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o bin/metad ./cmd/metad

help: ## this list
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

generate: ## the BPF objects and their Go, with the pinned clang
	@scripts/install build generate
	go generate ./bpf

generate-check: generate ## fails if make generate changes what is committed
	@git diff --exit-code -- bpf || { echo 'generated files differ from what is committed: run make generate and commit'; exit 1; }

test: ## everything this machine can run
	@scripts/install build test
	$(MAKE) --no-print-directory test-unit
	@if [[ $$(id -u) -eq 0 ]]; then $(MAKE) --no-print-directory test-root; else \
		echo 'NOT ROOT: the eBPF, namespace and Docker tests were NOT run (sudo make test-root runs them)'; fi

test-unit: ## what needs neither root nor Docker
	$(GOTEST) ./...

test-root: ## real eBPF, network namespaces, Docker Engine; needs root
	@scripts/install build test
	@mountpoint -q /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf
	$(GOTEST) -tags root -run '^TestRoot' -p 1 -count 1 ./...

test-kernels: ## the data-path tests on other kernels, under qemu
	@scripts/install build kernels
	scripts/kernels/run

# What decides about packets, and the takeover; about ten minutes without KVM.
ARM64 := ^TestRoot(Serve|Verdicts|Spoof|Containers|Follow|Pins|HostRoute|Bpftool|Takeover|Crash)$$
test-arm64: ## the core of test-kernels on an arm64 kernel, under qemu
	@scripts/install build kernels arm64
	RUN='$(ARM64)' PACKAGES='pkg/loader pkg/takeover' GUEST_SECONDS=1500 scripts/kernels/run 6.12-arm64

test-systemd: ## restart, reload and stop by a real systemd; needs root
	@scripts/install build test engines
	@mountpoint -q /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf
	scripts/systemd/run

test-self: ## which container, with a real Engine on cgroup v2 under qemu, and 200 first instructions; needs root
	@scripts/install build test kernels
	PACKAGE=cmd/metad RUN='^TestRootSelf' ENV=METAD_SELF_STARTS=200 GUEST_SECONDS=6000 scripts/docker-v2/run

test-engines: ## the tests with Docker on Docker 20.10, 26.1, 28.5 and 29 (ENGINE=26.1: that one alone); needs root
	@scripts/install build engines
	@mountpoint -q /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf
	scripts/engines/run $(ENGINE)

packages: ## deb, rpm and apk for amd64 and arm64, in dist/
	@scripts/install build
	packaging/build packages

image: ## container images for amd64 and arm64, without Docker, in dist/
	@scripts/install build
	packaging/build image

release: ## packages, images, archives, SBOMs and their sums, in dist/; of a commit without changes
	@scripts/install build
	packaging/build release

test-packages: packages ## the packages in fresh roots of Debian bookworm and trixie; needs root
	@scripts/install build packages
	scripts/packages/test

test-image: image ## the image on a real Docker Engine, with a restart of it; needs root
	@scripts/install build test
	@mountpoint -q /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf
	METAD_TEST_IMAGE=$$(echo $(CURDIR)/dist/metad_*_linux_$$(go env GOARCH).image.tar.gz) \
		$(GOTEST) -tags 'root image' -run '^TestRootImage$$' -count 1 ./cmd/metad

test-release: ## two builds of the release are the same bytes
	@scripts/install build
	scripts/packages/twice

screenshots: ## docs/images: metad top in tmux, and a dashboard's panels as a real Prometheus answers; needs root
	@scripts/install build test prometheus screenshots
	@mountpoint -q /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf
	$(GOTEST) -tags 'root screenshots' -ldflags '-X main.version=$(VERSION)' -run '^TestScreenshots$$' -count 1 ./cmd/metad

test-prometheus: ## rules, dashboards and metrics with a real Prometheus
	@scripts/install build prometheus
	cd packaging/prometheus && promtool check rules rules.yml && promtool test rules rules_test.yml
	$(GOTEST) -tags prometheus -run '^TestPrometheus$$' -count 1 ./cmd/metad

bench: ## the request path and the proxy against a floor, and a bystander under attack, as ratios; needs root
	@scripts/install build test
	@mountpoint -q /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf
	go test -tags bench -count 1 -timeout 20m -v -run '^TestBench' ./internal/bench
	go test -tags root -count 1 -run '^$$' -bench 'Program' -benchtime 2s ./pkg/loader
	go test -count 1 -run '^$$' -bench . -benchtime 200x ./pkg/mdfile
	go test -tags root -count 1 -run '^$$' -bench . -benchtime 15x ./pkg/dockerproxy

bench-density: ## metad on made-up hosts of many containers, DENSITY="10x3 100x3 1000x3"; needs root
	@scripts/install build test
	@$(MAKE) --no-print-directory build
	@mountpoint -q /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf
	METAD=$(CURDIR)/bin/metad DENSITY="$(DENSITY)" go test -tags bench -count 1 -timeout 90m -v -run '^TestDensity$$' ./internal/bench

bench-stats: ## what statistics cost, against Docker's stream; needs root
	@scripts/install build test
	scripts/bench-stats.sh

docs: ## docs/reference, from the code
	$(GOTEST) -run '^TestReference$$' -count 1 ./cmd/metad -update

FUZZTIME ?= 30s
fuzz: ## every fuzz target for FUZZTIME
	@scripts/install build
	scripts/fuzz $(FUZZTIME)

lint: ## formatting, vet, linters, lines of 100 columns; prints the longest functions and files
	@scripts/install build generate
	@out=$$(go tool goimports -l -local metad $$(git ls-files '*.go')); [[ -z $$out ]] || { echo "goimports: $$out"; exit 1; }
	clang-format-14 --dry-run --Werror bpf/*.[ch]
	go vet ./... && go vet -tags root ./... && go vet -tags bench ./internal/bench
	go tool staticcheck -tags root ./...
	go tool go-errorlint -tags root ./...
	go tool ineffassign ./...
	go tool misspell -error $$(git ls-files '*.go' '*.md' '*.[ch]')
	GOOS=windows go vet ./pkg/mdfile
	@go run ./scripts/longest $$(git ls-files '*.go' '*.[ch]')

# What differs between Engines: who a container is, what the Engine's events and answers say, and what
# its clients send through the proxy.
ENGINE_TESTS := ^TestRoot(FirstInstruction|AWSVPC|DockerNetworks|Compose|ComposeV4|TaskOfECS|ContainerOfDocker|Life|Awsvpc|HealthPortsVolumes|Swarm|DockerRestart|CLI|CreateFields|Names|F05ContainerReadsItsFile|F17Restart|VolumesFrom|CgroupMatchesEngine|DockerSource)$$

check: generate-check lint build ## everything that CI runs; needs root
	$(MAKE) --no-print-directory test-kernels
	RUN='$(ENGINE_TESTS)' $(MAKE) --no-print-directory test-engines ENGINE=26.1
	$(MAKE) --no-print-directory test

demo: ## two real tasks ask metad about themselves; needs root
	@scripts/install build demo
	@$(MAKE) --no-print-directory build
	@scripts/demo

clean: ## removes bin, dist and .cache
	rm -rf bin dist .cache

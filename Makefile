# byokd: `make` alone lists the targets.
SHELL := /bin/bash

GO      ?= go
export PATH := $(CURDIR)/.cache/go/bin:$(PATH)# where deploy/toolchain.sh puts what it fetches
# Keys can be erased without a trace where Go's experiment runtimesecret exists (docs/ARCHITECTURE.md).
GOOS    ?= $(shell uname -s | tr A-Z a-z)
GOARCH  ?= $(patsubst aarch64,arm64,$(patsubst x86_64,amd64,$(shell uname -m)))
ifneq (,$(filter linux/amd64 linux/arm64,$(GOOS)/$(GOARCH)))
export GOEXPERIMENT := runtimesecret
endif
# Stamp the commit where git may read the repository (it may not when root builds another user's clone).
BUILDVCS := $(shell git rev-parse HEAD >/dev/null 2>&1 && echo auto || echo false)
# grpcnotrace: gRPC's trace pages call methods by name, and the linker would keep every method of every type for them.
BUILD    := CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=$(BUILDVCS) -tags grpcnotrace
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
GOVULNCHECK := golang.org/x/vuln/cmd/govulncheck@v1.9.0
ACTIONLINT  := github.com/rhysd/actionlint/cmd/actionlint@v1.7.12
RCLONE   := v1.71.0
FUZZTIME ?= 30s
SOAK     ?= 20

.DEFAULT_GOAL := help
.PHONY: help toolchain build run test race lint vulncheck fuzz bench bench-limits bench-scale bench-peers rclone micro e2e workloads conformance-s3 conformance-fs soak image chart clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# What is built or tested needs Go first.
build image chart test race lint vulncheck fuzz bench bench-limits bench-scale rclone micro e2e workloads conformance-s3 soak: | toolchain

toolchain: ## see to it that there is a Go new enough: installs it when root on Debian
	@[[ '$(GO)' != go ]] || deploy/toolchain.sh

build: ## build bin/byokd and bin/devcloud
	$(BUILD) -o bin/byokd ./cmd/byokd
	$(BUILD) -o bin/devcloud ./cmd/devcloud

image: ## build the container images of byokd and devcloud into .cache/image, without a container engine
	cd deploy/image && $(GO) run . -program byokd $(IMAGE) && $(GO) run . -program devcloud $(IMAGE)

chart: ## write what follows from the chart anew: the Kustomize base and the tests' renderings
	cd test/chart && $(GO) test . -update && $(GO) test .

run: build ## try it: a stand-in for AWS, an encrypted disk and a bucket in ./run, until Ctrl-C
	@exec deploy/run.sh

test: ## run all tests; installs what they need when root on Debian
	@exec test/run.sh

race: ## run all tests under the race detector
	$(GO) test -race -timeout 30m ./...

lint: ## gofmt, go vet, staticcheck, shellcheck, actionlint
	@unformatted=$$(gofmt -l bench cmd deploy fs internal keyguard metrics objstore test); \
	  if [ -n "$$unformatted" ]; then echo "not gofmt'ed:"; echo "$$unformatted"; exit 1; fi
	$(GO) vet ./...
	GOEXPERIMENT= $(GO) vet ./...
	GOEXPERIMENT= $(GO) run $(STATICCHECK) ./...
	@if command -v shellcheck >/dev/null; then shellcheck deploy/*.sh deploy/scripts/*.sh test/*.sh test/workloads/*.sh test/conformance/*.sh test/kube/*.sh .ci/run; \
	  else echo "shellcheck is not installed: the scripts were not looked at (apt-get install shellcheck)"; fi
	GOEXPERIMENT= $(GO) run $(ACTIONLINT)
	@for module in deploy/image test/chart test/kube; do (cd $$module && $(GO) vet ./...) || exit 1; done

vulncheck: ## known vulnerabilities in what byokd is built of, as far as its code can reach them
	@GOVULNCHECK=$(GOVULNCHECK) test/vulncheck.sh

fuzz: ## fuzz every decoder for FUZZTIME (30s) each
	@set -euo pipefail; for pkg in $$($(GO) list ./...); do \
	  for target in $$($(GO) test -list '^Fuzz' $$pkg | grep '^Fuzz' || true); do \
	    echo "$$pkg $$target"; $(GO) test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 1s $$pkg; done; done

bench: build ## compare with raw ext4, loopback and the peers installed, S3 with the direct way; gate, freezes under load: in some 10 minutes
	@mkdir -p .cache
	$(GO) run ./bench -json .cache/bench.json -svg .cache/bench.svg $(BENCH)
	@echo "figures: .cache/bench.json, picture: .cache/bench.svg"

bench-limits: build ## what loads reach without cryptography, on the disk and on one in memory: what is in the way of a goal
	@mkdir -p .cache
	$(GO) run ./bench -parts limits,memlimits,s3limits -json .cache/limits.json -svg .cache/limits.svg $(BENCH)

bench-scale: build ## a million files, a file of 1 TiB, 10,000 open files, 64 writers, starts: curves, in some 10 minutes
	@mkdir -p .cache
	$(GO) run ./bench -parts scale -json .cache/scale.json -plot .cache/scale.svg $(BENCH)
	@echo "figures: .cache/scale.json, curves: .cache/scale.svg"

bench-peers: ## install what bench compares with and measures by, on Debian
	apt-get update -q && apt-get install -q -y --no-install-recommends gocryptfs encfs cryfs rclone fio sqlite3 rocksdb-tools e2fsprogs

rclone: ## build an rclone that serves S3 into .cache, for make bench to compare with: a large build
	GOBIN=$(CURDIR)/.cache GOEXPERIMENT= $(GO) install github.com/rclone/rclone@$(RCLONE)

micro: ## run the Go benchmarks with their allocation counts
	$(GO) test -run '^$$' -bench . -benchmem ./...

e2e: build ## run the whole-system tests, telling their figures, S3 clients of every kind, and a Kubernetes API server
	BYOKD_E2E=1 test/prepare.sh
	BYOKD_E2E=1 BYOKD_REQUIRE=s3clients $(GO) test -count=1 -v -timeout 30m -run 'TestRealClients|TestSDKs|TestLinks|TestLong' ./objstore
	BYOKD_E2E=1 BYOKD_REQUIRE=fuse,runc,cgroups $(GO) test -count=1 -v -timeout 60m ./test/...
	cd deploy/image && BYOKD_E2E=1 $(GO) test -count=1 -v -timeout 30m -run TestReproducible .
	test/kube/prepare.sh
	cd test/kube && $(GO) test -count=1 -v -timeout 20m .

workloads: ## run OpenSearch and an engine with Zeebe's storage on a mount, through freezes of OUTAGES (1s,60s), kills, backups, restores
	BYOKD_WORKLOADS=1 BYOKD_WORKLOADS_OUTAGES=$(OUTAGES) BYOKD_REQUIRE=fuse $(GO) test -count=1 -v -timeout 90m -run '^TestWorkload' ./test

conformance-s3: ## run versitygw's public S3 tests against byokd and compare with docs/CONFORMANCE.md
	BYOKD_CONFORMANCE='$(or $(TESTS),all)' $(GO) test -count=1 -v -timeout 30m -run TestConformanceS3 ./test

conformance-fs: build ## run pjdfstest, fsx and stress-ng on a mount and on plain ext4
	test/conformance/fs.sh

soak: ## 10 M operations against plain ext4, 1000 freezes and thaws under load, a freeze of minutes of the filesystem and of an upload, 100 scanned ones, 10,000 power cuts, 500 kills of everything, 9,000 of the worker below its mount, an hour of everything at once with nothing growing, an hour of fuzzing for each decoder; then run the moving parts SOAK (20) times under the race detector
	BYOKD_SOAK_CYCLES=1000 BYOKD_SOAK_OUTAGES=1 $(GO) test -count=1 -v -timeout 0 \
	  -run 'TestFreezeAndThawBounds|TestRecoveryDoesNotDependOnTheOutage|TestThousandPodsOnOneKey' ./keyguard/...
	BYOKD_OPS=10000000 BYOKD_INODES=10000 BYOKD_CACHED_MIB=1024 BYOKD_FROZEN_FOR=5m $(GO) test -count=1 -v -timeout 0 \
	  -run 'TestDifferential|TestFreezeFigures|TestFreezeMatrix' ./fs
	BYOKD_FROZEN_FOR=3m $(GO) test -count=1 -v -timeout 0 -run TestUploadThroughALongFreeze ./objstore
	BYOKD_ROUNDS=1000 $(GO) test -count=1 -v -timeout 0 -run 'TestRevocation/(disable|disable,_write-through)$$' ./test
	BYOKD_POWERCUT_ROUNDS=25 $(GO) test -count=1 -v -timeout 0 ./test/powercut # 10,500 points on byokd
	BYOKD_KILL_CYCLES=500 $(GO) test -count=1 -v -timeout 0 -run TestEverythingKilled ./test
	BYOKD_KILLS=1000 $(GO) test -count=1 -v -timeout 0 -run 'TestTorture(Below)?$$' ./fs
	BYOKD_KILLS=200 $(GO) test -count=1 -v -timeout 0 -run 'TestWorkerKilled$$|TestDatabasesOverWorkerKills|TestWorkerOutOfMemory' ./test
	BYOKD_SOAK_FREEZES=100 $(GO) test -count=1 -v -timeout 0 -run TestFreezeOverAndOver ./test
	BYOKD_SOAK_FOR=1h $(GO) test -count=1 -v -timeout 0 -run 'TestSoak$$' ./test
	$(MAKE) fuzz FUZZTIME=1h
	$(GO) test -race -count=$(SOAK) -timeout 0 ./keyguard/... ./fs/... ./objstore/... ./metrics/... ./cmd/... ./test/...

clean: ## remove what build and tests left; run/ with its data stays
	rm -rf bin .cache

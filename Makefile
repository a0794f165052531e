# What a newcomer runs; CI runs `make test` and nothing else (.ci/run).
# Plain make: GNU make 3.81, which macOS ships, is enough.

CARGO ?= cargo

.PHONY: help test test-cluster lint fmt docs bench chaos million replicas foreign database

help:
	@echo 'make test     formatting, lints, all tests on SQLite and MariaDB or MySQL, documentation; what CI runs'
	@echo 'make fmt      formats the code'
	@echo 'make lint     formatting and clippy, with warnings denied'
	@echo 'make docs     builds the documentation of the code into target/doc, with warnings denied'
	@echo 'make bench    measures against yardsticks (docs/performance.md)'
	@echo 'make chaos    200,000 pushes through everything APNs and a network can do; CHAOS_SEED repeats one (tests/it/chaos.rs)'
	@echo 'make million  a broadcast to 1,000,000 devices with kills in it, each outcome held against the ledger (tests/it/million.rs)'
	@echo 'make replicas two, three and five replicas on one database, then five minutes of kills and hangs (tests/it/replicas/)'
	@echo 'make test-cluster  the tests on a Galera cluster of three nodes, which are killed, frozen and cut off'
	@echo 'make foreign  tests with clients and tools that are not ours (tests/foreign/run.sh)'
	@echo
	@echo 'TEST_DATABASE_URL=mysql://user:password@host/ names a server for the tests. Without it they start one of their'
	@echo 'own from an installed mariadbd or mysqld; `make test` installs that first where it can.'

# In this order, also under `make -j`: the cheapest answer first, and the last lines are those of the tests. Without
# backtraces, which would bury the sentence that says what failed.
test:
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory docs
	@$(MAKE) --no-print-directory database
	RUST_BACKTRACE=0 $(CARGO) test --locked --no-fail-fast

lint:
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings

fmt:
	$(CARGO) fmt

docs:
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --locked --no-deps --document-private-items

database:
	@sh tests/database.sh

bench: database
	$(CARGO) bench --locked --profile dist --bench bench

# The short one is among the tests. The seed is printed, and decides what happens to each push.
chaos: database
	CHAOS_PUSHES=$${CHAOS_PUSHES:-200000} CHAOS_SEED=$${CHAOS_SEED:-$$(date +%s)} \
		$(CARGO) test --locked --test it chaos:: -- --nocapture --test-threads=1

# The short one is among the tests.
million: database
	MILLION_DEVICES=$${MILLION_DEVICES:-1000000} \
		$(CARGO) test --locked --test it million:: -- --nocapture --test-threads=1

# The short ones are among the tests. Clocks that differ take libfaketime.
replicas: database
	REPLICAS=$${REPLICAS:-2,3,5} REPLICAS_NOTIFICATIONS=$${REPLICAS_NOTIFICATIONS:-200000} \
		REPLICAS_DEVICES=$${REPLICAS_DEVICES:-500000} REPLICAS_SECONDS=$${REPLICAS_SECONDS:-300} \
		REPLICAS_SEED=$${REPLICAS_SEED:-$$(date +%s)} \
		$(CARGO) test --locked --test it replicas:: -- --nocapture --test-threads=1

# Installs Galera where it can. One round of kills; CLUSTER_RUNS=10 is the long run.
test-cluster:
	@CARGO='$(CARGO)' sh tests/cluster.sh

foreign:
	@bash tests/foreign/run.sh

#!/bin/sh
# Installs what a Galera cluster of MariaDB takes, where it can, and runs on one of three nodes: the suite that any MySQL
# has to pass, on the first node, and then the cluster's own tests, which kill nodes and replicas (tests/it/cluster.rs).
#
# The tests start the nodes themselves, in a temporary folder and on free ports of 127.0.0.1, and end them however the run
# ends. CLUSTER_RUNS, CLUSTER_SEED and CLUSTER_SECONDS say how often, which and how long is killed.
set -eu

say() { printf '%s\n' "tests/cluster.sh: $*" >&2; }

has() { command -v "$1" >/dev/null 2>&1; }

# The same places as `LIBRARIES` in tests/it/support/galera.rs.
installed() {
    for library in /usr/lib/galera/libgalera_smm.so /usr/lib64/galera/libgalera_smm.so \
        /usr/lib64/galera-4/libgalera_smm.so /usr/lib/galera-4/libgalera_smm.so; do
        [ -f "$library" ] && has rsync && has wsrep_sst_rsync && PATH="$PATH:/usr/sbin" has mariadbd && return 0
    done
    return 1
}

stop() {
    say "$1"
    say "these tests need a MariaDB server with Galera 4, and rsync:"
    say "  Debian, Ubuntu   apt-get install mariadb-server galera-4 rsync"
    say "  Fedora           dnf install mariadb-server-galera rsync"
    exit 1
}

if ! installed; then
    . "$(dirname "$0")/packages.sh"
    may_install Galera it
    say "installing a MariaDB server with Galera; its package may start a service, which the tests do not use"
    apt_update
    apt install --no-install-recommends mariadb-server galera-4 rsync || stop "apt-get could not install it"
    installed || stop "apt-get has installed it somewhere else than where the tests look"
fi
sh "$(dirname "$0")/database.sh"

cargo=${CARGO:-cargo}
export TEST_CLUSTER=galera
unset TEST_DATABASE_URL

failed=0
say "what any MySQL has to pass, on the first of three nodes"
$cargo test --locked --no-fail-fast --test it -- --skip on_sqlite \
    store:: api:: tour:: ownership:: broadcast:: cancel:: retention:: breaker:: mistakes:: lost:: process:: wave:: kill:: \
    pace:: busy:: replicas:: || failed=1
say "three nodes, with a replica of Sonnette at each"
$cargo test --locked --no-fail-fast --test it cluster:: -- --nocapture --test-threads=1 || failed=1
exit "$failed"

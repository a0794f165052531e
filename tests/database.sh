#!/bin/sh
# Makes sure that the tests can start a MariaDB or MySQL server of their own, and take the README's tour with curl: quiet
# if both are installed, installs them on Debian and Ubuntu, and else says what to install.
#
# Only the `-core` packages are installed: the programs without the service, so no server runs on this machine because
# of us, and nothing listens but while the tests run.
set -eu

say() { printf '%s\n' "tests/database.sh: $*" >&2; }

# The same places as `find_program` in tests/it/support/database.rs.
PATH="$PATH:/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/usr/libexec:/opt/homebrew/bin:/opt/homebrew/sbin"
PATH="$PATH:/opt/homebrew/opt/mariadb/bin:/usr/local/opt/mariadb/bin:/opt/homebrew/opt/mysql/bin:/usr/local/opt/mysql/bin"
export PATH

has() { command -v "$1" >/dev/null 2>&1; }

installed() {
    has curl || return 1
    if has mariadbd; then
        has mariadb-install-db && has my_print_defaults
    else
        has mysqld
    fi
}

stop() {
    if [ -n "${TEST_DATABASE_URL:-}" ]; then
        say "$1"
        say "going on with the server in TEST_DATABASE_URL; the tests that kill a server of their own will fail"
        exit 0
    fi
    say "$1"
    say "the tests need curl, and a MariaDB (10.6 or later) or MySQL (8.0 or later) server, whose programs they start:"
    say "  Debian, Ubuntu   apt-get install curl mariadb-server-core mariadb-client-core"
    say "  Fedora           dnf install curl mariadb-server"
    say "  Arch             pacman -S curl mariadb"
    say "  macOS            brew install curl mariadb"
    say "or name a running one: TEST_DATABASE_URL=mysql://user:password@host/ make test"
    exit 1
}

installed && exit 0

. "$(dirname "$0")/packages.sh"
may_install "curl, or mariadbd and mysqld," one

say "installing curl and the programs of a MariaDB or MySQL server (no service is started)"
apt_update

# Older Ubuntu has its MariaDB only under a versioned name.
for packages in \
    "mariadb-server-core mariadb-client-core" \
    "mariadb-server-core-10.6 mariadb-client-core-10.6" \
    "mysql-server-core-8.0"; do
    # shellcheck disable=SC2086 -- a list of packages
    if apt install --no-install-recommends curl ca-certificates $packages && installed; then
        exit 0
    fi
done
stop "apt-get could not install a server"

# shellcheck shell=sh
# Sourced by what installs packages of Debian or Ubuntu for the tests, behind its own `say`, `has` and `stop`.

# Goes on if packages may be installed, and else ends by `stop`: "$1" is missing, and "$2" stands for it in the sentence.
may_install() {
    has apt-get || stop "$1 is missing, and this is not Debian or Ubuntu"
    as_root=
    if [ "$(id -u)" != 0 ]; then
        has sudo || stop "$1 is missing, and installing $2 takes root or sudo"
        # Without a terminal there is nobody to type a password.
        if [ -t 0 ]; then as_root="sudo"; else as_root="sudo -n"; fi
        $as_root true || stop "$1 is missing, and sudo refused"
    fi
}

apt() { $as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o Dpkg::Use-Pty=0 "$@" </dev/null; }

apt_update() { apt update || say "apt-get update failed; trying with the lists there are"; }

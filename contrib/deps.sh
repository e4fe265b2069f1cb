#!/bin/sh
# deps.sh: installs, or names, the tools that a target of the Makefile needs.
#
#   contrib/deps.sh build|demo|test|bench|peers|debian|vm|conformance|static|std|static-test
#
# As root on Debian or Ubuntu it installs missing tools with apt; elsewhere it prints them and fails.
# Optional tools of `make test` (cargo fmt, cargo clippy, shellcheck, mandoc, strace, python3) and
# `make bench` (strace, iperf3) are installed if apt has them, and are never a reason to fail. `std` is
# a Rust with the source of its std.
set -eu
cd "$(dirname "$0")/.."
least=$(sed -n 's/^rust-version *= *"\([0-9.]*\)".*/\1/p' Cargo.toml)
missing=
std=

has() { command -v "$1" >/dev/null 2>&1; }
want() { has "$1" || missing="$missing $2"; } # TOOL PACKAGE
new_enough() { printf '%s\n%s\n' "$least" "$1" | sort -V -C; }

rust_ok() {
	cargo --version >/dev/null 2>&1 && version=$(rustc --version 2>/dev/null) || return 1
	version=${version#rustc }
	new_enough "${version%% *}"
}

candidate() { apt-cache policy "$1" | sed -n 's/^ *Candidate: \([0-9].*\)/\1/p'; }

# The first Rust in apt that is new enough, with the source of its std if needed. Debian 12 has a second
# one, for browsers, for which apt removes the older one.
rust_packages() {
	for suffix in '' -web; do
		version=$(candidate "rustc$suffix")
		if [ -n "$version" ] && new_enough "$version"; then
			echo "rustc$suffix cargo$suffix${std:+ rust$suffix-src}"
			return
		fi
	done
}

install() {
	echo "apt-get install $*"
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq -o Dpkg::Use-Pty=0 \
		--no-install-recommends "$@" </dev/null
}

has cc && echo '#include <stdlib.h>' | cc -E - >/dev/null 2>&1 || missing="$missing gcc libc6-dev"
[ -d /etc/ssl/certs ] || missing="$missing ca-certificates" # cargo fetches over HTTPS
case ${1:-} in
build) ;;
static) python3 -c 'import ensurepip' 2>/dev/null || missing="$missing python3-venv" ;;
std) std=yes ;;
demo | test | bench | peers | debian | vm | conformance | static-test)
	want iptables iptables
	want ipset ipset
	want ip iproute2
	want unshare util-linux
	want curl curl
	want openssl openssl
	case $1 in
	bench | static-test) want python3 python3 ;;
	debian) want debootstrap debootstrap ;;
	vm)
		want debootstrap debootstrap
		want qemu-system-x86_64 qemu-system-x86
		want mkfs.ext4 e2fsprogs
		want python3 python3
		;;
	peers) [ -x /usr/bin/python3 ] || missing="$missing python3" ;; # for Debian's modules, no other will do
	conformance) python3 -c 'import ensurepip' 2>/dev/null || missing="$missing python3-venv" ;;
	esac
	if [ "$1" = static-test ]; then
		want readelf binutils
		want qemu-mips-static qemu-user-static
	fi ;;
*) echo "usage: contrib/deps.sh build|demo|test|bench|peers|debian|vm|conformance|static|std|static-test" >&2; exit 2 ;;
esac

apt=
if [ "$(id -u)" = 0 ] && has apt-get; then apt=yes; fi
if [ -n "$apt" ] && { [ -n "$missing$std" ] || ! rust_ok; }; then
	apt-get update -qq </dev/null
	[ -z "$std" ] && rust_ok || missing="$missing $(rust_packages)"
	# shellcheck disable=SC2086 # a list of words
	[ -z "$missing" ] || install $missing
	missing=
fi
rust_ok || missing="$missing rust>=$least"
if [ -n "$missing" ]; then
	echo "missing:$missing" >&2
	echo "(names of Debian packages; as root on Debian or Ubuntu, this script installs them. Installed" \
		"Rust: $(rustc --version 2>/dev/null || echo none); newer ones: https://rustup.rs)" >&2
	exit 1
fi

[ -n "$apt" ] || exit 0
optional=
case $1 in
test)
	has shellcheck || optional=shellcheck
	has mandoc || optional="$optional mandoc"
	has strace || optional="$optional strace"
	has python3 || optional="$optional python3"
	# The tools of the very compiler in use, where that is Debian's.
	package=$(dpkg -S "$(command -v rustc)" 2>/dev/null | sed 's/:.*//') || true
	case $package in
	rustc*) optional="$optional rustfmt${package#rustc} rust-clippy${package#rustc}" ;;
	esac
	;;
bench)
	has strace || optional=strace
	has iperf3 || optional="$optional iperf3"
	;;
esac
for tool in $optional; do
	dpkg -s "$tool" >/dev/null 2>&1 || [ -z "$(candidate "$tool")" ] || install "$tool" || true
done

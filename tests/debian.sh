#!/bin/sh
# debian.sh [MODULE::...]: runs end-to-end tests with the iptables and ipset of other Debian releases, as root.
#
# target/debian has a root for each: that of this host's release, with the tools of the other one. Nothing on
# this host is changed.
set -eu
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- kernel:: repair:: sets:: start:: state:: tags:: commits::
# shellcheck disable=SC1091 # the file of this host
host=$(. /etc/os-release && echo "$VERSION_CODENAME")
folder=${CARGO_TARGET_DIR:-target}/debian
program=$(cargo test --locked --test e2e --no-run 2>&1 | sed -n 's/.*Executable.*(\(.*\))$/\1/p')

make_root() { # RELEASE ROOT
	rm -rf "$2"
	debootstrap --variant=minbase --include=curl,gcc,iproute2,ipset,iptables,libc6-dev,openssl,procps,python3,strace \
		"$host" "$2" >"$2.log"
	echo "deb http://deb.debian.org/debian $1 main" >"$2/etc/apt/sources.list.d/$1.list"
	chroot "$2" apt-get -qq update
	packages='iptables ipset libxtables12 libip4tc2 libip6tc2 libnftnl11'
	[ "$1" != bullseye ] || packages="$packages libipset13" # has another name in trixie
	# PACKAGE/RELEASE: with -t alone, apt keeps a newer version.
	# shellcheck disable=SC2046,SC2086 # lists of words
	DEBIAN_FRONTEND=noninteractive chroot "$2" apt-get -qq install -y -o Dpkg::Use-Pty=0 --allow-downgrades \
		-t "$1" $(printf "%s/$1 " $packages) >>"$2.log"
	touch "$2/ready"
}

# shellcheck disable=SC2016 # expanded by the other shell
enter='root=$0; project=$1; shift
mount --bind "$root" "$root"
mkdir -p "$root$project" "$root/host"
for path in /proc /sys /dev "$project"; do mount --rbind "$path" "$root$path"; done
cd "$root"
pivot_root . host
cd "$project"
umount -l /host
iptables --version
ipset --version
exec "$@"'

mkdir -p "$folder"
for release in bullseye trixie; do
	root=$(realpath "$folder")/$release
	[ -e "$root/ready" ] || make_root "$release" "$root"
	echo "With the iptables and ipset of $release:"
	unshare -m sh -ec "$enter" "$root" "$PWD" \
		env -i HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin CARGO_MANIFEST_DIR="$PWD" "$program" "$@"
done

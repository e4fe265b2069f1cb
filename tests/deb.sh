#!/bin/sh
# deb.sh: the Debian package, installed, used, upgraded, rebooted, removed and purged as on a host that
# runs systemd: with this host's files, tools and dpkg database, and nothing of it touched.
#
#   tests/deb.sh FILE.deb
#
#   this host's /  ==(overlay, changes in memory)==>  / of a systemd that is process 1 of its own
#                                                     namespaces, and starts this very script;
#                                                     after a reboot, of the next one
set -eu

# --- On the host: a folder for what goes in and comes out, and the namespaces.

outside() {
	[ "$(id -u)" = 0 ] || { echo 'tests/deb.sh: only root can mount an overlay' >&2; exit 1; }
	work=$(mktemp -d)
	trap 'rm -rf "$work"' EXIT
	trap 'exit 1' HUP INT TERM
	mkdir "$work/newer"
	cp "$0" "$work/deb.sh"
	cp "$1" "$work/first.deb"
	# A newer version, with another white.list.
	dpkg-deb -R "$1" "$work/newer/deb"
	sed -i 's/^Version: .*/&+newer/' "$work/newer/deb/DEBIAN/control"
	echo '# newer' >>"$work/newer/deb/etc/rfw/white.list"
	dpkg-deb --root-owner-group --build "$work/newer/deb" "$work/newer.deb" >/dev/null
	# Whoever of these ends takes the next one along; none of them holds this script's output open.
	status=0
	setpriv --pdeathsig KILL timeout -s KILL 240 \
		setpriv --pdeathsig KILL unshare -mp --fork --kill-child \
		"$work/deb.sh" machine "$work" </dev/null >>"$work/log" 2>&1 &
	wait $! || status=$?
	cat "$work/log"
	[ "$status" = 0 ] || echo "tests/deb.sh: failed ($status)" >&2
	exit "$status"
}

# --- In the namespaces: the disk, which a reboot leaves. All that this host starts at boot is disabled.

machine() {
	mount --make-rprivate /
	mount -t tmpfs deb /mnt
	mkdir /mnt/changes /mnt/work /mnt/root /mnt/cgroup
	mount -t overlay -o lowerdir=/,upperdir=/mnt/changes,workdir=/mnt/work deb /mnt/root
	cd /mnt/root
	: >etc/fstab
	# What `make install` may have brought to this host.
	rm -rf etc/rfw etc/logrotate.d/rfw etc/systemd/system/rfw.service* usr/local/lib/systemd/system/rfw.service
	rm -rf etc/systemd/system/*.wants etc/systemd/network/*
	# A control group of its own: two such runs at once would remove each other's.
	mount -t cgroup2 deb /mnt/cgroup
	group=/mnt/cgroup/deb-test-${1##*.}
	mkdir "$group"
	echo 0 >"$group/cgroup.procs"
	for boot in first second third; do
		unshare -mpnCiu --fork --kill-child "$1/deb.sh" boot "$1" $boot
	done
	echo 0 >/mnt/cgroup/cgroup.procs
	find "$group" -depth -type d -exec rmdir {} +
}

# --- A boot, with empty tables: the new root, where the kernel's own settings cannot be written.

boot() {
	cd /mnt/root
	ip link set lo up
	mount -t proc deb proc
	mount --bind proc/sys proc/sys
	mount -o remount,ro,bind proc/sys
	mount -t sysfs -o ro deb sys
	mount -t cgroup2 deb sys/fs/cgroup
	for folder in run tmp dev; do mount -t tmpfs -o mode=755 deb $folder; done
	for device in null zero full random urandom; do
		: >dev/$device
		mount --bind /dev/$device dev/$device
	done
	mkdir run/deb dev/pts
	mount -t devpts -o newinstance,ptmxmode=666 deb dev/pts
	ln -s pts/ptmx dev/ptmx
	mount --bind "$1" run/deb
	cat >etc/systemd/system/deb-test.service <<-END
		[Unit]
		DefaultDependencies=no
		Requires=sysinit.target
		Wants=multi-user.target
		After=sysinit.target network.target
		SuccessAction=exit
		FailureAction=exit
		FailureActionExitStatus=1
		[Service]
		Type=oneshot
		ExecStart=/run/deb/deb.sh $2
		StandardOutput=append:/run/deb/log
		StandardError=append:/run/deb/log
	END
	mkdir run/old
	pivot_root . run/old
	umount -l /run/old
	mount --make-rshared / # as systemd hands credentials over by mounts
	exec env -i container=deb-test /lib/systemd/systemd --unit=deb-test.service \
		--log-target=journal --show-status=no
}

# --- Started by that systemd as soon as it has reached network.target: the test.

failed() {
	echo "FAILED: $*"
	journalctl -q --no-pager -o cat -u rfw
	exit 1
}
# is WHAT EXPECTED COMMAND...: the command's output, without its last newlines
is() {
	what=$1 expected=$2
	shift 2
	got=$("$@" 2>&1) || :
	[ "$got" = "$expected" ] || failed "$what: $* says '$got', not '$expected'"
	echo "ok: $what"
}
there() { for path; do [ -e "$path" ] || failed "$path is missing"; done; }
gone() { for path; do [ ! -e "$path" ] || failed "$path is still there"; done; }
# Without triggers: man-db would look through all of this host's manual, for ten seconds.
package() { dpkg --no-triggers "$@" </dev/null || failed "dpkg $*"; }
pid() { systemctl show -P MainPID rfw; }
status() { grep "^$1:" "/proc/$(pid)/status"; }
modes() { stat -c %a /etc/rfw/* | sort -u; }
block() { curl -sS -X PUT http://127.0.0.1:7390/drop/input/any/203.0.113.7 | cut -d , -f 1; }
guards() { iptables -S INPUT | grep -c -- '--comment "rfw:guard" -j DROP'; }
outward() { curl -skm 5 -o /dev/null -w '%{http_code}' https://192.0.2.1:7393/; }
waited() {
	journalctl -q _SYSTEMD_INVOCATION_ID="$(systemctl show -P InvocationID rfw)" |
		grep -c 'WARNING cannot listen at https://192.0.2.1:7393:'
}
since() { systemctl show -P "$1TimestampMonotonic" "$2"; }
rules() { iptables -S INPUT | grep -c -- '-s 203.0.113.7/32 .*-j DROP'; }
files() { (cd /etc/rfw && sha256sum rfw.conf white.list server.crt server.key); }
changed() { files | diff - files.before; }
answering() {
	for _ in $(seq 100); do
		if curl -s -o /dev/null http://127.0.0.1:7390/; then return; fi
		sleep 0.1
	done
	failed 'rfw does not answer'
}

first() {
	cd /run/deb
	echo '--- a first install'
	package -i first.deb
	is 'as packed' '' dpkg -V rfw
	is 'the folder is closed' 700 stat -c %a /etc/rfw
	is 'so are its files' 600 modes
	is 'the client is there' rfw readlink /usr/sbin/rfwc
	is 'not started' inactive systemctl is-active rfw
	is 'nor at boot' disabled systemctl is-enabled rfw
	is 'where the unit finds it' 1 grep -c '^ExecStart=/usr/sbin/rfw ' /usr/lib/systemd/system/rfw.service
	is 'the credentials are blank' 2 grep -c '^auth.* =$' /etc/rfw/rfw.conf

	echo '--- set up as the README says'
	rfwgen 127.0.0.1 keys >/dev/null
	install -m 600 keys/server_127.0.0.1/server.* /etc/rfw/
	sed -i 's/^auth.username =.*/& admin/; s/^auth.password =.*/& secret/' /etc/rfw/rfw.conf
	echo 192.0.2.1 >>/etc/rfw/white.list
	sed -i 's/^# state.file/state.file/' /etc/rfw/rfw.conf
	sed -i 's/^outward.server.ip =.*/outward.server.ip = 192.0.2.1/' /etc/rfw/rfw.conf
	files >files.before
	systemctl enable --now rfw || failed 'it does not start'
	answering
	is 'it blocks' '{"result":"inserted"' block
	is 'as an ordinary user' rfw ps -o user= -p "$(pid)"
	is 'with CAP_NET_ADMIN alone' "CapEff:	0000000000001000" status CapEff
	is 'its state has a place' 700 stat -c %a /var/lib/private/rfw
	rfw -t >/dev/null || failed 'rfw -t, as root, refuses what rfw itself uses'
	is 'nobody else can hold its lock' 700 stat -Lc %a /run/rfw
	there /run/rfw/net-*

	echo '--- an upgrade'
	before=$(pid)
	package --force-confold -i newer.deb
	[ "$(pid)" != "$before" ] || failed 'the old rfw still runs'
	answering
	is 'the rule is there once' 1 rules
	is 'nothing of mine changed' '' changed
	there /etc/rfw/white.list.dpkg-dist
	gone /etc/rfw/rfw.conf.dpkg-dist
	systemctl stop rfw
	package -i newer.deb
	is 'one that was stopped stays so' inactive systemctl is-active rfw

	cat >/etc/systemd/network/deb.network <<-END
		[Match]
		Name=lo
		[Network]
		Address=192.0.2.1/32
	END
	systemctl --quiet enable systemd-networkd
}

second() {
	cd /run/deb
	echo '--- a reboot'
	is 'after network.target, the rule is there' 1 rules
	is 'and those of the port' 1 guards
	[ "$(since ActiveEnter rfw)" -lt "$(since InactiveExit systemd-networkd)" ] ||
		failed 'rfw is ready before the network starts'
	echo 'ok: rfw was ready before the network started'
	for _ in $(seq 50); do
		[ "$(outward)" != 000 ] || sleep 0.1
	done
	is 'the outward server has its address' 401 outward
	is 'for which it waited' 1 waited
	echo 'wrong' >>/etc/rfw/rfw.conf
}

third() {
	cd /run/deb
	echo '--- a boot with a wrong configuration'
	is 'the network starts' active systemctl is-active systemd-networkd
	is 'rfw does not' activating systemctl is-active rfw
	is 'without a rule' 0 rules
	sed -i '$d' /etc/rfw/rfw.conf
	answering
	is 'put right, it has started by itself' 1 rules

	echo '--- removal'
	package -r rfw
	is 'stopped' inactive systemctl is-active rfw
	is 'the rule goes on' 1 rules
	gone /usr/sbin/rfw /usr/sbin/rfwc /etc/systemd/system/multi-user.target.wants/rfw.service
	is 'nothing of mine changed' '' changed

	echo '--- purge'
	package -P rfw
	gone /etc/rfw/rfw.conf /etc/rfw/white.list /etc/logrotate.d/rfw
	there /etc/rfw/server.key
	is 'the rule goes on' 1 rules
	echo 'tests/deb.sh: passed'
}

case ${1:-} in
*.deb) outside "$1" ;;
machine | boot | first | second | third) "$@" ;;
*) echo 'usage: tests/deb.sh FILE.deb' >&2; exit 2 ;;
esac

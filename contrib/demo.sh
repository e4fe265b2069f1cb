#!/bin/sh
# demo.sh: rfw blocks an attacker, with real packets and the real kernel, in private network namespaces
# that disappear when it ends.
#
#   contrib/demo.sh target/release/rfw
#
#     "attacker"                         "firewall" (rfw, a web site, the administrator)
#     eth0 192.0.2.66 ------ veth ------ eth0 192.0.2.1
#
# Each step prints a command and its output. The first step whose output is not as expected ends the demo
# with status 1.
set -eu

if [ "${2:-}" != --inside ]; then
	rfw=$(readlink -f "$1")
	if [ "$(id -u)" = 0 ]; then own=-nm; else own=-rnm; fi
	unshare $own true || {
		echo "demo: cannot create namespaces; run it as root (in a container: a privileged one)" >&2
		exit 1
	}
	exec unshare $own "$0" "$rfw" --inside "$(readlink /proc/self/ns/net)"
fi
rfw=$1
if [ "$(readlink /proc/self/ns/net)" = "$3" ]; then
	echo "demo: this is not a private network namespace" >&2
	exit 1
fi

contrib=$(readlink -f "$(dirname "$0")")
dir=$(mktemp -d)
pids=
# shellcheck disable=SC2086 # a list of numbers
trap 'kill $pids 2>/dev/null || true; cd /; rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
cd "$dir"
export HOME="$dir" no_proxy='*' # no .curlrc, no proxy of the person who runs this
out=
number=0

step() {
	number=$((number + 1))
	printf '\n%s. %s\n' $number "$1"
}
fail() {
	printf '\ndemo: FAILED at step %s: %s\n' $number "$1"
	[ ! -s rfw.log ] || { echo 'The log of rfw:'; tail -n 20 rfw.log; }
	exit 1
} >&2
# on HOST COMMAND: prints and runs the command, prints its output and stores it in $out.
on() {
	printf '   %s$ %s\n' "$1" "$2"
	case $1 in
	attacker) out=$(nsenter --net="/proc/$attacker/ns/net" sh -c "$2" 2>&1) || true ;;
	*) out=$(sh -c "$2" 2>&1) || true ;;
	esac
	[ -z "$out" ] || printf '%s\n' "$out" | sed 's/^/      /'
}
shows() { case $out in *"$1"*) ;; *) fail "the output should contain: $1" ;; esac; }
shows_no() { case $out in *"$1"*) fail "the output should not contain: $1" ;; esac; }
# wait_for SECONDS COMMAND...
wait_for() {
	tries=$(($1 * 10))
	shift
	until "$@" >/dev/null 2>&1; do
		tries=$((tries - 1))
		[ $tries -gt 0 ] || fail "timed out waiting for: $*"
		sleep 0.1
	done
}

# The network of the picture above. A private /run for the locks of rfw and iptables.
mount -t tmpfs -o mode=755 tmpfs /run
ip link set lo up
unshare -n sleep 300 &
attacker=$!
pids="$pids $attacker"
elsewhere() { [ "$(readlink "/proc/$attacker/ns/net")" != "$(readlink /proc/self/ns/net)" ]; }
wait_for 5 elsewhere
ip link add eth0 type veth peer name eth0 netns $attacker
ip addr add 192.0.2.1/24 dev eth0
ip link set eth0 up
nsenter --net=/proc/$attacker/ns/net ip addr add 192.0.2.66/24 dev eth0
nsenter --net=/proc/$attacker/ns/net ip link set eth0 up

step 'Keys and a certificate for the server at 192.0.2.1'
PATH=$contrib:$PATH
on firewall 'rfwgen 192.0.2.1'
shows 'server_192.0.2.1/server.crt'

step 'rfw with both servers and the shipped rfw.conf and white.list, completed with user, password,'
echo '   certificate, and 192.0.2.1, the address of the administrator'
(umask 077
	sed -e 's|^auth.username =|& admin|' -e 's|^auth.password =|& secret|' \
		-e 's|file = server\.|file = server_192.0.2.1/server.|' "$contrib/../rfw.conf" >rfw.conf
	{ cat "$contrib/../white.list"; echo 192.0.2.1; } >white.list)
printf '   firewall$ rfw -f rfw.conf --logfile rfw.log &\n'
"$rfw" -f rfw.conf --logfile rfw.log &
pids="$pids $!"
wait_for 10 curl -sf http://127.0.0.1:7390/

step 'A web site on the firewall: packets from the attacker arrive'
site='openssl s_server -accept 192.0.2.1:443 -cert server_192.0.2.1/server.crt
	-key server_192.0.2.1/server.key -www -quiet'
# shellcheck disable=SC2086 # a list of words
$site </dev/null >/dev/null 2>&1 &
pids="$pids $!"
wait_for 10 curl -skf https://192.0.2.1/
visit="curl -k -sS -m 2 -o /dev/null -w 'HTTP %{http_code}\n' https://192.0.2.1/"
on attacker "$visit"
shows 'HTTP 200'

step 'The administrator blocks the attacker over HTTPS'
curl='curl -sS --cacert client/ca.crt --user admin:secret'
url=https://192.0.2.1:7393
on administrator "$curl -X PUT $url/drop/input/any/192.0.2.66"
shows '"result":"inserted"'

step 'Packets from the attacker no longer arrive'
on attacker "$visit"
shows '(28)' # curl: timed out

step 'The rule in the kernel (rules with rfw:guard protect the port of rfw)'
on firewall 'iptables -S'
shows '-A INPUT -s 192.0.2.66/32 '
on administrator "$curl $url/list/input"
shows '"source":"192.0.2.66"'

step 'A rule that expires after two seconds'
on administrator "$curl -X PUT '$url/drop/input/any/198.51.100.7?expire=2s'"
shows '"result":"inserted"'
on firewall 'iptables -S INPUT'
shows 198.51.100.7
gone() { ! iptables -S INPUT | grep -q 198.51.100.7; }
wait_for 6 gone
echo '   ... a little later:'
on firewall 'iptables -S INPUT'
shows_no 198.51.100.7

step 'The rule is deleted, and packets from the attacker arrive again'
on administrator "$curl -X DELETE $url/drop/input/any/192.0.2.66"
shows '"result":"deleted"'
on attacker "$visit"
shows 'HTTP 200'
on firewall 'iptables -S INPUT'
shows_no 192.0.2.66

printf '\nAll steps succeeded. Nothing on this host was changed.\n'

#!/bin/sh
# all.sh: what `make test` runs: every check and every test; at the end, what was skipped, what failed,
# and how many passed.
#
#   tests/all.sh RFW SCRIPT...     the release binary, and the shell scripts that shellcheck is to read
#
# A step that fails does not keep the others from running. A skipped test is not a pass: it is counted
# apart. A test that skips itself, or a part of itself, prints `SKIPPED: TEST (REASON)`.
set -u
rfw=$1
shift
cd "$(dirname "$0")/.." || exit
dir=$(mktemp -d) || exit
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
: >"$dir/skipped"
: >"$dir/failed"
passed=0

lines() { wc -l <"$dir/$1" | tr -d ' '; }

# run COMMAND...: its output goes to $dir/log as well; -> its exit status
run() {
	echo "+ $*"
	{
		"$@" 2>&1
		echo $? >"$dir/status"
	} | tee "$dir/log"
	sed -n 's/.*SKIPPED: //p' "$dir/log" | sort -u >"$dir/skips"
	cat "$dir/skips" >>"$dir/skipped"
	return "$(cat "$dir/status")"
}

# step NAME NEEDED REASON COMMAND...: one test, or REASON why it is skipped where NEEDED, a shell
# command, fails
step() {
	name=$1 needed=$2 reason=$3
	shift 3
	if ! (eval "$needed") >/dev/null 2>&1; then
		echo "SKIPPED: $name ($reason)"
		echo "$name ($reason)" >>"$dir/skipped"
	elif ! run "$@"; then
		echo "$name" >>"$dir/failed"
	elif [ ! -s "$dir/skips" ]; then
		passed=$((passed + 1))
	fi
}

# Each of Rust's tests counts.
cargo_test() {
	before=$(lines failed)
	status=0
	run cargo test --locked --no-fail-fast || status=$?
	sed -n '/ignored, not a test/d; s/^test \(.*\) \.\.\. \(ignored.*\)/\1 (\2)/p' "$dir/log" >>"$dir/skipped"
	# What a test prints when it fails, it prints again from its inner run.
	sed -n 's/^test \(.*\) \.\.\. FAILED$/\1/p' "$dir/log" | sort -u >>"$dir/failed"
	if [ $status != 0 ] && [ "$(lines failed)" = "$before" ]; then
		echo 'cargo test' >>"$dir/failed"
	fi
	ok=$(awk '/^test result:/ { for (i = 2; i <= NF; i++) if ($i == "passed;") n += $(i - 1) }
		END { print n + 0 }' "$dir/log")
	passed=$((passed + ok - $(lines skips)))
}

has_systemd() { [ "$(id -u)" = 0 ] && command -v dpkg-deb && [ -x /lib/systemd/systemd ]; }

step 'cargo fmt' 'cargo fmt --version' 'this Rust has none' cargo fmt --check
step 'cargo clippy' 'cargo clippy --version' 'this Rust has none' \
	cargo clippy --all-targets --locked -- -D warnings
step shellcheck 'command -v shellcheck' 'not installed' shellcheck "$@"
step mandoc 'command -v mandoc' 'not installed' mandoc -Tlint -Wwarning contrib/man/*
step tests/argv.py 'command -v python3' 'no python3' python3 tests/argv.py "$rfw" 3000
step tests/chaos.py 'command -v python3' 'no python3' \
	python3 tests/chaos.py "$rfw" 16 1 --without hang
unpacked() { command -v python3 && make -s "${CARGO_TARGET_DIR:-target}/$1"; }
step tests/crowdsec.py 'unpacked crowdsec' 'no python3, or no package crowdsec to unpack' make crowdsec
step tests/mqtt.py 'unpacked mqtt' 'no python3, or no package mosquitto to unpack' make mqtt
step tests/deb.sh has_systemd 'needs root, dpkg and systemd' make deb-test
cargo_test
step fuzzing 'cargo +nightly fuzz --version && command -v c++' \
	'needs a nightly Rust, cargo-fuzz and c++' make fuzz SECONDS=4

echo
sed 's/^/failed: /' "$dir/failed"
sed 's/^/skipped: /' "$dir/skipped"
[ -s "$dir/skipped" ] || echo 'no test was skipped'
if [ -s "$dir/skipped" ] && [ "${CI:-}" = true ]; then
	echo 'WARNING: this is CI, and still the tests above were skipped; install what they need' >&2
fi
echo "$passed passed, $(lines failed) failed, $(lines skipped) skipped"
[ ! -s "$dir/failed" ]

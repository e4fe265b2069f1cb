#!/bin/sh
# static.sh: builds rfw as one static file with musl, for a server or a router.
#
#   contrib/static.sh [x86_64|aarch64|armv7|mips|mipsel]      makes target/static/rfw-TARGET
#
# Two builds of the same source with the same Rust are identical, in any directory.
# zig provides C compiler, linker and musl; with cargo-zigbuild it is installed from PyPI into target/static.
# Rust's std comes from rustup if it has the target, otherwise from its source, which Debian
# packages and rustup's rust-src have. RUSTC_BOOTSTRAP permits some unstable flags.
set -eu
cd "$(dirname "$0")/.."
ZIG=0.17.1
ZIGBUILD=0.24.1

target=${1:-x86_64}
how='-C link-arg=-pie'
case $target in
x86_64 | aarch64) triple=$target-unknown-linux-musl ;;
armv7)
	triple=armv7-unknown-linux-musleabihf
	how="$how -C target-feature=+thumb-mode" ;; # less code
mips | mipsel)
	triple=$target-unknown-linux-musl
	how='-C relocation-model=static' ;; # their static PIE crashes when a thread starts
*)
	echo 'usage: contrib/static.sh [x86_64|aarch64|armv7|mips|mipsel]' >&2
	exit 2 ;;
esac

# choose_rust: sets rustc and source (1: build std); fails if no installed Rust can build for the target.
choose_rust() {
	for rustc in "$(command -v rustc)" /usr/bin/rustc; do
		lib=$("$rustc" --print sysroot 2>/dev/null)/lib/rustlib || continue
		source=
		[ ! -d "$lib/$triple/lib" ] || return 0
		source=1
		[ ! -f "$lib/src/rust/library/Cargo.lock" ] || return 0
	done
	return 1
}

contrib/deps.sh static
choose_rust || { contrib/deps.sh std && choose_rust; } || {
	echo "static.sh: no installed Rust has std for $triple, or its source; run" \
		"rustup target add $triple, or rustup component add rust-src" >&2
	exit 1
}

mkdir -p "${CARGO_TARGET_DIR:=target}/static"
out=$(cd "$CARGO_TARGET_DIR/static" && pwd)
tools=$out/tools-$ZIG-$ZIGBUILD
if [ ! -x "$tools/bin/cargo-zigbuild" ]; then
	rm -rf "$tools"
	python3 -m venv "$tools"
	"$tools/bin/pip" install -q --disable-pip-version-check --only-binary :all: \
		"ziglang==$ZIG" "cargo-zigbuild==$ZIGBUILD"
fi

# The release profile, optimized for size, std too. A program that aborts needs no unwind tables.
export CARGO_PROFILE_RELEASE_OPT_LEVEL=z CARGO_PROFILE_RELEASE_TRIM_PATHS=all
export PATH="$tools/bin:$PATH" CARGO="${rustc%rustc}cargo" RUSTC="$rustc" RUSTC_BOOTSTRAP=1
export CARGO_TARGET_DIR="$out/build" XDG_CACHE_HOME="$out/cache" ZIG_GLOBAL_CACHE_DIR="$out/cache/zig"
export RUSTFLAGS="-C link-self-contained=no -C force-unwind-tables=no $how"
unset CARGO_ENCODED_RUSTFLAGS
cargo-zigbuild zigbuild --release --locked --target "$triple" -Z trim-paths \
	${source:+-Z build-std=std,panic_abort -Z build-std-features=optimize_for_size}
cp "$out/build/$triple/release/rfw" "$out/rfw-$target.new"
mv "$out/rfw-$target.new" "$out/rfw-$target"
ls -l "$out/rfw-$target"

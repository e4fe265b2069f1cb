# rfw: what a person types. `make help` lists it.

PREFIX ?= /usr/local
DESTDIR ?=
CARGO_TARGET_DIR ?= target

version := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)
rfw := $(CARGO_TARGET_DIR)/release/rfw
# What install and deb take: a static one for example.
BIN ?= $(rfw)
schemathesis := $(CARGO_TARGET_DIR)/schemathesis-4.32.5/bin/schemathesis
fail2ban := $(CARGO_TARGET_DIR)/fail2ban
crowdsec := $(CARGO_TARGET_DIR)/crowdsec
mqtt := $(CARGO_TARGET_DIR)/mqtt
firewalls := $(CARGO_TARGET_DIR)/firewalls
peers := $(CARGO_TARGET_DIR)/peers
promtool := $(CARGO_TARGET_DIR)/prometheus/usr/bin/promtool
sbin := $(DESTDIR)$(PREFIX)/sbin
bin := $(DESTDIR)$(PREFIX)/bin
man := $(DESTDIR)$(PREFIX)/share/man
unit := $(DESTDIR)$(PREFIX)/lib/systemd/system/rfw.service
etc := $(DESTDIR)/etc/rfw
rotate := $(DESTDIR)/etc/logrotate.d/rfw
pages := $(wildcard contrib/man/*)
scripts := contrib/rfwgen contrib/rfw-feed contrib/crowdsec/rfw-crowdsec $(wildcard contrib/*.sh contrib/deb/* tests/*.sh tests/*/*.sh) \
    contrib/openwrt/rfw.init .ci/run

# What libFuzzer is let loose on, and for how many seconds each: an hour in all.
fuzzers := $(basename $(notdir $(wildcard tests/fuzz/*.rs)))
SECONDS ?= 450

# rustup's Rust where there is one; ordinary users have no sbin.
export PATH := $(HOME)/.cargo/bin:$(PATH):/usr/local/sbin:/usr/sbin:/sbin

.PHONY: build demo test confined fuzz mutants bench hostile argv chaos soak conformance fail2ban crowdsec mqtt firewalls peers static \
    static-test run install uninstall deb deb-test clean deps help

build: $(rfw) ## the release binary, target/release/rfw (the default)

$(rfw): Cargo.toml Cargo.lock $(shell find src -type f)
	contrib/deps.sh build
	cargo build --release --locked
	@touch $@

demo: $(rfw) ## block an attacker in a network of its own: real packets, no risk
	contrib/deps.sh demo
	contrib/demo.sh $(rfw)

test: $(rfw) ## every test: formatting, lints, scripts, unit and end-to-end tests
	contrib/deps.sh test
	@tests/all.sh $(rfw) $(scripts)

fuzz: $(addprefix fuzz-,$(fuzzers)) ## every parser by libFuzzer, SECONDS=450 each; needs a nightly Rust and cargo-fuzz

# No sanitizer: rfw forbids unsafe code. What was found is written to tests/fuzz/artifacts/.
fuzz-%:
	mkdir -p tests/fuzz/corpus/$*
	cargo +nightly fuzz run -s none --fuzz-dir tests/fuzz $* \
	    tests/fuzz/corpus/$* tests/fuzz/seeds/$* -- -dict=tests/fuzz/rfw.dict \
	    -max_total_time=$(SECONDS) -timeout=10 -verbosity=0 -print_final_stats=1

mutants: ## small defects, one by one: do the unit tests notice? Needs cargo-mutants; an hour
	CARGO_PROFILE_DEV_DEBUG=0 cargo mutants --output $(CARGO_TARGET_DIR)

confined: ## the end-to-end tests with rfw as contrib/rfw.service has it (iptables-nft; as root)
	contrib/deps.sh test
	RFW_CONFINED=1 cargo test --locked --test e2e

bench: $(rfw) ## speed and size beside the bare tools, in a network of its own
	contrib/deps.sh bench
	python3 tests/bench.py $(rfw) $(ROWS)

hostile: $(rfw) ## an honest client among 4,000 hostile ones, in a network of its own; 12 minutes
	contrib/deps.sh bench
	python3 tests/hostile.py $(rfw) $(ROWS)

argv: $(rfw) ## 100,000 random requests: what reaches iptables; COUNT=, SEED=; a quarter of an hour
	contrib/deps.sh bench
	python3 tests/argv.py $(rfw) $(or $(COUNT),100000) $(SEED)

chaos: $(rfw) ## random requests, kills and faults against a model; COUNT=, SEED=, FLAGS=; a quarter of an hour
	contrib/deps.sh bench
	python3 tests/chaos.py $(rfw) $(or $(COUNT),200) $(SEED) $(FLAGS)

soak: $(rfw) ## 1,000,000 commands: memory and descriptors stay flat; COUNT=
	contrib/deps.sh bench
	python3 tests/soak.py $(rfw) $(COUNT)

conformance: $(rfw) $(schemathesis) $(promtool) ## contrib/openapi.yaml against the running server; EXAMPLES=; needs PyPI
	$(dir $(schemathesis))python tests/conformance.py $(rfw) $(promtool) $(EXAMPLES)

$(schemathesis):
	contrib/deps.sh conformance
	python3 -m venv $(@D)/..
	$(@D)/pip install -q schemathesis==4.32.5
	@touch $@

fail2ban: $(rfw) $(fail2ban) ## the real fail2ban bans through rfw, and feeds by cron; a minute
	contrib/deps.sh bench
	python3 tests/fail2ban.py $(rfw) $(fail2ban)

crowdsec: $(rfw) $(crowdsec) ## the real CrowdSec and its custom bouncer ban through rfw; a quarter of a minute
	contrib/deps.sh bench
	python3 tests/crowdsec.py $(rfw) $(crowdsec)

mqtt: $(rfw) $(mqtt) ## peers publish through a real mosquitto, a fleet's host obeys; a quarter of a minute
	contrib/deps.sh bench
	python3 tests/mqtt.py $(rfw) $(mqtt)

firewalls: $(rfw) $(firewalls) ## the real Docker, ufw, firewalld and netfilter-persistent next to rfw (as root); WORDS=; a quarter of an hour
	contrib/deps.sh bench
	python3 tests/firewalls.py $(rfw) $(firewalls) $(WORDS)

peers: $(rfw) $(peers) ## rfw, fail2ban, firewalld and CrowdSec compared, as a table; as root; ten minutes; ROWS=
	contrib/deps.sh peers
	/usr/bin/python3 tests/peers.py $(rfw) $(peers) $(ROWS)

# Debian's packages unpacked, not installed: nothing of them starts on this host.
packages_crowdsec := crowdsec crowdsec-custom-bouncer
packages_mqtt := mosquitto mosquitto-clients libmosquitto1 libcjson1 libdlt2 libwrap0
packages_firewalls := docker.io containerd runc libdevmapper1.02.1 libseccomp2 busybox-static \
    ufw firewalld python3-firewall python3-dbus python3-gi gir1.2-glib-2.0 libgirepository-1.0-1 libglib2.0-0 \
    python3-nftables nftables libnftables1 libnftnl11 libjansson4 libedit2 libbsd0 \
    dbus-daemon dbus-bin libdbus-1-3 libapparmor1 libexpat1 \
    netfilter-persistent iptables-persistent ipset-persistent
packages_peers := fail2ban crowdsec crowdsec-firewall-bouncer firewalld python3-firewall python3-nftables nftables \
    libnftables1 libnftnl11 libjansson4 libedit2 libbsd0 dbus-daemon dbus-bin libdbus-1-3 libapparmor1 libexpat1 \
    python3-dbus python3-gi gir1.2-glib-2.0 libgirepository-1.0-1 libglib2.0-0 gir1.2-nm-1.0 libnm0
$(fail2ban) $(crowdsec) $(mqtt) $(firewalls) $(peers) $(CARGO_TARGET_DIR)/prometheus:
	rm -rf $@.new
	mkdir -p $@.new
	cd $@.new && apt-get -qq download $(or $(packages_$(@F)),$(@F)) && \
	    for package in *.deb; do dpkg -x $$package . || exit; done
	mv $@.new $@

$(promtool): | $(CARGO_TARGET_DIR)/prometheus

static: ## rfw for a router, in one static file: TARGET=x86_64, aarch64, armv7, mips or mipsel
	contrib/static.sh $(or $(TARGET),x86_64)

static-test: ## builds and tries what `make static` makes, for all five or TARGET=; half an hour
	contrib/deps.sh static-test
	python3 tests/static.py $(TARGET)

run: $(rfw) run/rfw.conf ## rfw in the foreground, as root, FOR REAL on this host; files in run/
	@echo 'rfw runs with run/rfw.conf (user and password are in it). In another window:'
	@echo '  curl -X PUT "http://127.0.0.1:7390/drop/input/any/192.0.2.1?expire=1m"'
	@echo '  curl http://127.0.0.1:7390/list'
	@echo 'Ctrl-C stops it; its rules stay in iptables.'
	$(rfw) -f run/rfw.conf --logfile -

# The shipped files, with credentials and keys. Made once; yours to change.
run/rfw.conf:
	contrib/deps.sh demo
	rm -rf run
	contrib/rfwgen 127.0.0.1 run
	umask 077; cp white.list run/ && \
	sed -e 's|^auth.username =|& admin|' \
	    -e "s|^auth.password =|& $$(openssl rand -hex 16)|" \
	    -e 's|file = server\.|file = server_127.0.0.1/server.|' rfw.conf >run/new && \
	mv run/new run/rfw.conf

install: $(BIN) ## programs, manual, systemd unit to PREFIX, new files only to /etc (DESTDIR=, BIN=)
	install -d "$(sbin)" "$(bin)"
	install -m 755 $(BIN) "$(sbin)/rfw"
	ln -sf rfw "$(sbin)/rfwc"
	install -m 755 contrib/rfwgen "$(bin)/rfwgen"
	install -m 755 contrib/rfw-feed "$(bin)/rfw-feed"
	for page in $(pages); do \
	    install -D -m 644 $$page "$(man)/man$${page##*.}/$${page##*/}" || exit; done
	install -D -m 644 contrib/rfw.service "$(unit)"
	sed -i 's|^ExecStart=/usr/local/|ExecStart=$(PREFIX)/|' "$(unit)"
	install -d -m 700 "$(etc)"
	[ -e "$(etc)/rfw.conf" ] || install -m 600 rfw.conf "$(etc)/rfw.conf"
	[ -e "$(etc)/white.list" ] || install -m 600 white.list "$(etc)/white.list"
	[ -e "$(rotate)" ] || install -D -m 644 contrib/logrotate "$(rotate)"

uninstall: ## removes all that but the files in /etc; the rules in iptables stay, too
	rm -f "$(sbin)/rfw" "$(sbin)/rfwc" "$(bin)/rfwgen" "$(bin)/rfw-feed" "$(unit)"
	for page in $(pages); do rm -f "$(man)/man$${page##*.}/$${page##*/}"; done
	@echo 'Left: $(etc), $(rotate), /var/log/rfw.log, and in iptables the rules with the comment "rfw..."'

deb: $(BIN) ## a Debian package, target/rfw_VERSION_ARCHITECTURE.deb (BIN=)
	rm -rf $(CARGO_TARGET_DIR)/deb
	$(MAKE) install PREFIX=/usr DESTDIR=$(CARGO_TARGET_DIR)/deb
	contrib/deb/pack $(CARGO_TARGET_DIR)/deb

deb-test: deb ## the package under a systemd of its own: installed, upgraded, removed (as root)
	tests/deb.sh $(CARGO_TARGET_DIR)/rfw_$(version)_$$(dpkg --print-architecture).deb

clean: ## removes what was built, and run/
	cargo clean
	rm -rf run

deps: ## installs (Debian or Ubuntu, as root) or names the tools that all of this needs
	contrib/deps.sh test
	contrib/deps.sh bench

help: ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## /  make \1\t/p' Makefile | expand -t 20

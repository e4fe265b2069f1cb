# `make help` lists the targets: "## user: TEXT" is in its first part, "## TEXT" in its second.

PREFIX ?= /usr/local
DESTDIR ?=
CARGO_TARGET_DIR ?= target

version := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)
rfw := $(CARGO_TARGET_DIR)/release/rfw
# What install and deb install, for example a static binary.
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

# The fuzz targets, and the seconds for each.
fuzzers := $(basename $(notdir $(wildcard tests/fuzz/*.rs)))
SECONDS ?= 450

# Prefer rustup's Rust; ordinary users have no sbin in their PATH.
export PATH := $(HOME)/.cargo/bin:$(PATH):/usr/local/sbin:/usr/sbin:/sbin

.PHONY: build demo test confined fuzz mutants bench hostile argv chaos soak conformance fail2ban crowdsec mqtt firewalls peers \
    debian vm static static-test run install uninstall deb deb-test clean deps help

build: $(rfw) ## user: build the release binary, target/release/rfw (the default); 3 minutes

$(rfw): Cargo.toml Cargo.lock $(shell find src -type f)
	contrib/deps.sh build
	cargo build --release --locked
	@touch $@

demo: $(rfw) ## user: block an attacker with real packets, in private network namespaces; 10 seconds
	contrib/deps.sh demo
	contrib/demo.sh $(rfw)

test: $(rfw) ## user: all tests: formatting, lints, scripts, unit and end-to-end tests; 18 minutes
	contrib/deps.sh test
	@tests/all.sh $(rfw) $(scripts)

fuzz: $(addprefix fuzz-,$(fuzzers)) ## run each parser under libFuzzer, SECONDS=450 each; needs a nightly Rust and cargo-fuzz; 70 minutes

# No sanitizer: rfw forbids unsafe code. Findings are written to tests/fuzz/artifacts/.
fuzz-%:
	mkdir -p tests/fuzz/corpus/$*
	cargo +nightly fuzz run -s none --fuzz-dir tests/fuzz $* \
	    tests/fuzz/corpus/$* tests/fuzz/seeds/$* -- -dict=tests/fuzz/rfw.dict \
	    -max_total_time=$(SECONDS) -timeout=10 -verbosity=0 -print_final_stats=1

mutants: ## put in small defects that the unit tests must detect; needs cargo-mutants; 4 hours
	CARGO_PROFILE_DEV_DEBUG=0 CARGO_PROFILE_DEV_OPT_LEVEL=1 cargo mutants --output $(CARGO_TARGET_DIR)

confined: $(rfw) ## run the end-to-end tests with the privileges of contrib/rfw.service (iptables-nft, as root); 10 minutes
	contrib/deps.sh test
	RFW_CONFINED=1 cargo test --locked --test e2e

bench: $(rfw) ## measure speed and size, next to the bare tools; ROWS=, TAGS=16; half an hour
	contrib/deps.sh bench
	python3 tests/bench.py $(rfw) $(ROWS)

hostile: $(rfw) ## serve a well-behaved client among 4,000 hostile ones; ROWS=; 12 minutes
	contrib/deps.sh bench
	python3 tests/hostile.py $(rfw) $(ROWS)

argv: $(rfw) ## send 100,000 random requests and check what reaches iptables; COUNT=, SEED=; 5 minutes
	contrib/deps.sh bench
	python3 tests/argv.py $(rfw) $(or $(COUNT),100000) $(SEED)

chaos: $(rfw) ## compare random requests, kills and faults with a model; COUNT=, SEED=, FLAGS=; 15 minutes
	contrib/deps.sh bench
	python3 tests/chaos.py $(rfw) $(or $(COUNT),200) $(SEED) $(FLAGS)

soak: $(rfw) ## send 1,000,000 commands: memory and descriptors must not grow; COUNT=; half an hour
	contrib/deps.sh bench
	python3 tests/soak.py $(rfw) $(COUNT)

conformance: $(rfw) $(schemathesis) $(promtool) ## compare contrib/openapi.yaml with the running server; EXAMPLES=; needs PyPI; 2 minutes
	$(dir $(schemathesis))python tests/conformance.py $(rfw) $(promtool) $(EXAMPLES)

$(schemathesis):
	contrib/deps.sh conformance
	python3 -m venv $(@D)/..
	$(@D)/pip install -q schemathesis==4.32.5
	@touch $@

fail2ban: $(rfw) $(fail2ban) ## ban with the real fail2ban, and run the jobs of contrib/feeds.cron; a minute
	contrib/deps.sh bench
	python3 tests/fail2ban.py $(rfw) $(fail2ban)

crowdsec: $(rfw) $(crowdsec) ## ban with the real CrowdSec and its custom bouncer; 15 seconds
	contrib/deps.sh bench
	python3 tests/crowdsec.py $(rfw) $(crowdsec)

mqtt: $(rfw) $(mqtt) ## publish blocks through a real mosquitto; 15 seconds
	contrib/deps.sh bench
	python3 tests/mqtt.py $(rfw) $(mqtt)

firewalls: $(rfw) $(firewalls) ## run the real Docker, ufw, firewalld and netfilter-persistent next to rfw (as root); WORDS=; 15 minutes
	contrib/deps.sh bench
	python3 tests/firewalls.py $(rfw) $(firewalls) $(WORDS)

peers: $(rfw) $(peers) ## compare rfw, fail2ban, firewalld and CrowdSec in a table (as root); ROWS=; 10 minutes
	contrib/deps.sh peers
	/usr/bin/python3 tests/peers.py $(rfw) $(peers) $(ROWS)

debian: ## run end-to-end tests with the iptables of Debian 11 and 13 (as root, on Debian); TESTS=; 25 minutes
	contrib/deps.sh debian
	tests/debian.sh $(TESTS)

vm: deb ## boot Debian with its own kernel in a virtual machine, and cut its power (as root, on Debian); RELEASE=, BIN=; 15 minutes
	contrib/deps.sh vm
	python3 tests/vm.py $(CARGO_TARGET_DIR)/rfw_$(version)_amd64.deb $(CARGO_TARGET_DIR)/vm $(RELEASE)

# Debian's packages are unpacked, not installed, so none of their services starts on this host.
packages_crowdsec := crowdsec crowdsec-custom-bouncer
packages_mqtt = mosquitto mosquitto-clients libmosquitto1 \
    $(filter-out libc6 libelogind0,$(filter lib%,$(shell apt-cache depends mosquitto)))
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
	cd $@.new && apt-get -qq -o APT::Sandbox::User=root download $(or $(packages_$(@F)),$(@F)) && \
	    for package in *.deb; do dpkg -x $$package . || exit; done
	mv $@.new $@

$(promtool): | $(CARGO_TARGET_DIR)/prometheus

static: ## user: build one static file with musl, TARGET=x86_64, aarch64, armv7, mips or mipsel; 5 minutes
	contrib/static.sh $(or $(TARGET),x86_64)

static-test: ## build and try all static files, or TARGET=; 30 minutes
	contrib/deps.sh static-test
	python3 tests/static.py $(TARGET)

run: $(rfw) run/rfw.conf ## user: run rfw in the foreground, as root, ON THIS HOST; its files are in run/; until Ctrl-C
	@echo 'rfw runs with run/rfw.conf, which contains user and password. In another terminal:'
	@echo '  curl -X PUT "http://127.0.0.1:7390/drop/input/any/192.0.2.1?expire=1m"'
	@echo '  curl http://127.0.0.1:7390/list'
	@echo 'Ctrl-C stops rfw; its rules remain in iptables.'
	$(rfw) -f run/rfw.conf --logfile -

# The shipped files with credentials and keys, made once.
run/rfw.conf:
	contrib/deps.sh demo
	rm -rf run
	contrib/rfwgen 127.0.0.1 run
	umask 077; cp white.list run/ && \
	echo "s|^auth.password =|& $$(openssl rand -hex 16)|" | \
	sed -e 's|^auth.username =|& admin|' -e 's|file = server\.|file = server_127.0.0.1/server.|' -f - rfw.conf >run/new && \
	mv run/new run/rfw.conf

install: $(BIN) ## user: install programs, manual and unit to PREFIX=/usr/local, and new files to /etc (DESTDIR=, BIN=); a second
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

uninstall: ## user: remove them, except the files in /etc and the rules in iptables; a second
	rm -f "$(sbin)/rfw" "$(sbin)/rfwc" "$(bin)/rfwgen" "$(bin)/rfw-feed" "$(unit)"
	for page in $(pages); do rm -f "$(man)/man$${page##*.}/$${page##*/}"; done
	@echo 'Not removed: $(etc), $(rotate), drop-ins of rfw.service, /var/lib/rfw, /var/log/rfw.log, and the rules with the comment "rfw..." (contrib/man/rfw.8: Rules in the kernel)'

deb: $(BIN) ## user: build a Debian package, target/rfw_VERSION_ARCHITECTURE.deb (BIN=); 3 seconds
	rm -rf $(CARGO_TARGET_DIR)/deb
	$(MAKE) install PREFIX=/usr DESTDIR=$(CARGO_TARGET_DIR)/deb
	contrib/deb/pack $(CARGO_TARGET_DIR)/deb

deb-test: deb ## install, upgrade and remove the package under a real systemd (as root); 30 seconds
	tests/deb.sh $(CARGO_TARGET_DIR)/rfw_$(version)_$$(dpkg --print-architecture).deb

clean: ## user: remove what was built, and run/; a second
	cargo clean
	rm -rf run

deps: ## user: install (Debian or Ubuntu, as root) or print the tools that these targets need; a minute
	contrib/deps.sh test
	contrib/deps.sh bench

help: ## user: print this list
	@echo 'To use rfw:'
	@sed -n 's/^\([a-z0-9-]*\):.*## user: /  make \1\t/p' Makefile | expand -t 20
	@echo 'To develop it (nothing here changes the network of this host):'
	@sed -n '/## user: /d; s/^\([a-z0-9-]*\):.*## /  make \1\t/p' Makefile | expand -t 20

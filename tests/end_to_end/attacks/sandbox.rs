//! Applications that attack the kernel, the network, the host, or data of removed applications.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use capsule_tests::{Server, eventually, probe, processes, text};
use libtest_mimic::Trial;
use rustix::io::FdFlags;
use serde_json::json;

use crate::tenants::rootless;
use crate::test_of_processes;

pub fn trials() -> Vec<Trial> {
    vec![
        test_of_processes("an application cannot reach the host or cloud metadata, and nothing outside can reach it", network),
        test_of_processes("system calls of applications and builds are filtered", system_calls),
        test_of_processes("excessive output is dropped, and the shim counts towards the limits of its instance", flood),
        test_of_processes("user ids of removed applications are not reused", user_ids),
        rootless("without root, an application cannot reach the host's addresses or cloud metadata", network_without_root),
    ]
}

const HOST: &str = "one-production.localhost";

/// Runs a program in the probe and returns its output.
fn python(server: &Server, host: &str, code: &str) -> String {
    let mut path = "/python?code=".to_owned();
    for byte in code.bytes() {
        let _ = write!(path, "%{byte:02x}");
    }
    server.get(host, &path).body
}

/// Connects from inside the probe to each address; returns a line with `open` or the error for each, in order.
fn reach(server: &Server, addresses: &[(String, u16)]) -> Vec<String> {
    let list: Vec<_> = addresses.iter().map(|(host, port)| format!("({host:?}, {port})")).collect();
    // In parallel, because dropped packets run into a timeout.
    let code = format!(
        "import socket, concurrent.futures\n\
         def reach(address):\n    \
             try:\n        \
                 info = socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)[0]\n        \
                 with socket.socket(info[0], info[1]) as s:\n            \
                     s.settimeout(2); s.connect(info[4]); return 'open'\n    \
             except OSError as error: return f'{{type(error).__name__}}: {{error}}'\n\
         with concurrent.futures.ThreadPoolExecutor(32) as pool:\n    \
             print('\\n'.join(pool.map(reach, [{}])))\n",
        list.join(", ")
    );
    let lines: Vec<_> = python(server, HOST, &code).lines().map(str::to_owned).collect();
    assert_eq!(lines.len(), addresses.len(), "{lines:?}");
    lines
}

fn run(program: &str, arguments: &[&str]) -> String {
    let done = Command::new(program).args(arguments).output().expect("it runs");
    assert!(done.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8_lossy(&done.stdout).into_owned()
}

/// The IPv4 addresses of this machine beyond its loopback.
fn own_addresses() -> Vec<String> {
    let listed = run("ip", &["-4", "-o", "addr", "show", "scope", "global"]);
    let address = |line: &str| Some(line.split_whitespace().nth(3)?.split('/').next()?.to_owned());
    listed.lines().filter_map(address).collect()
}

/// A network next to the host, like that of a container or another machine, with cloud metadata addresses.
struct Neighbour {
    name: String,
    /// Only one can exist at a time.
    _alone: MutexGuard<'static, ()>,
}

static NEIGHBOUR: Mutex<()> = Mutex::new(());

impl Neighbour {
    const HOST: &str = "10.232.9.1";
    const OWN: &str = "10.232.9.2";
    const METADATA: [&str; 3] = ["169.254.169.252", "100.100.100.200", "168.63.129.16"];

    fn create() -> Self {
        let alone = NEIGHBOUR.lock().unwrap_or_else(PoisonError::into_inner);
        let name = format!("nb{}", std::process::id());
        let (near, far) = (format!("{name}a"), format!("{name}b"));
        let ip = |line: &str| run("ip", &line.split_whitespace().collect::<Vec<_>>());
        ip(&format!("netns add {name}"));
        ip(&format!("link add {near} type veth peer name {far} netns {name}"));
        ip(&format!("addr add {}/24 dev {near}", Self::HOST));
        ip(&format!("link set {near} up"));
        ip(&format!("-n {name} addr add {}/24 dev {far}", Self::OWN));
        ip(&format!("-n {name} link set {far} up"));
        ip(&format!("-n {name} link set lo up"));
        ip(&format!("-n {name} route add default via {}", Self::HOST));
        for address in Self::METADATA {
            ip(&format!("-n {name} addr add {address}/32 dev lo"));
            ip(&format!("route add {address}/32 via {} dev {near}", Self::OWN));
        }
        Self { name, _alone: alone }
    }

    /// Accepts connections on all its addresses while the child runs.
    fn listen(&self, port: u16) -> Listening {
        let code = format!("import socket\ns = socket.create_server(('', {port}))\nwhile True: s.accept()");
        let child = Command::new("ip")
            .args(["netns", "exec", &self.name, "python3", "-c", &code])
            .stdout(Stdio::null())
            .spawn()
            .expect("it runs");
        let child = Listening(child);
        let listening = || run("ip", &["netns", "exec", &self.name, "cat", "/proc/net/tcp"]).contains(&format!(":{port:04X} "));
        eventually("it listens", || listening().then_some(()));
        child
    }

    fn can_connect(&self, host: &str, port: &str) -> bool {
        let code = format!("import socket; socket.create_connection(({host:?}, {port}), 2)");
        let tried = Command::new("ip").args(["netns", "exec", &self.name, "python3", "-c", &code]).output();
        tried.expect("it runs").status.success()
    }
}

/// A listening process. Dropping the value kills it.
struct Listening(Child);

impl Drop for Listening {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "delete", &self.name]).status();
        let _ = Command::new("ip").args(["link", "delete", &format!("{}a", self.name)]).status();
    }
}

fn network() {
    let server = Server::default();
    let folder = probe("one");
    server.deploy(folder.path(), "one").ok();
    let own = text(&server.get(HOST, "/identity").json(), "address");
    let port = server.get(HOST, "/env").json()["PORT"].as_str().expect("a port").to_owned();
    let gateway = Ipv4Addr::from(u32::from(own.parse::<Ipv4Addr>().expect("an address")) - 1).to_string();

    // On every address of the host, IPv4 and IPv6.
    let listener = TcpListener::bind("[::]:0").expect("it listens");
    let listening = listener.local_addr().expect("an address").port();
    let datagrams = UdpSocket::bind("[::]:0").expect("it listens");
    datagrams.set_read_timeout(Some(Duration::from_millis(300))).expect("set");
    let telling = datagrams.local_addr().expect("an address").port();
    let neighbour = Neighbour::create();
    let _answering = neighbour.listen(8099);

    // Outbound network works: another machine is reachable, except at metadata addresses.
    assert_eq!(reach(&server, &[(Neighbour::OWN.into(), 8099)]), ["open"]);
    let metadata = Neighbour::METADATA.map(|address| (address.to_owned(), 8099));
    let host = own_addresses().into_iter().chain([gateway.clone(), Neighbour::HOST.into()]).map(|address| (address, listening));
    let forbidden: Vec<_> = host.chain(metadata).collect();
    for (address, reached) in forbidden.iter().zip(reach(&server, &forbidden)) {
        assert_ne!(reached, "open", "{address:?}");
    }
    let own_end = python(&server, HOST, "print(open('/proc/net/if_inet6').read())");
    assert!(own_end.lines().all(|line| line.trim_end().ends_with("lo") || line.is_empty()), "link-local: {own_end}");
    let code = format!(
        "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n\
         for host in [{gateway:?}, '255.255.255.255', '224.0.0.1']:\n    \
             try:\n        s.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1); s.sendto(b'x', (host, {telling}))\n    \
             except OSError: pass"
    );
    python(&server, HOST, &code);
    assert!(datagrams.recv(&mut [0; 8]).is_err(), "a datagram reached the host");

    // IPv6 on the veth pair, and only the host's filter: each filter must be sufficient.
    let pid = server.instances(folder.path())[0]["pid"].to_string();
    let inside = |line: &str| {
        let words: Vec<_> = ["-t", &pid, "-n"].into_iter().chain(line.split_whitespace()).collect();
        run("nsenter", &words)
    };
    let pair = run("ip", &["-o", "-4", "addr", "show", "to", &gateway]);
    let pair = pair.split_whitespace().nth(1).expect("an interface").to_owned();
    std::fs::write(format!("/proc/sys/net/ipv6/conf/{pair}/disable_ipv6"), "0").expect("written");
    inside("sysctl -qw net.ipv6.conf.eth0.disable_ipv6=0");
    inside("nft delete table inet capsule");
    let link_local = eventually("an address of the link", || {
        let listed = run("ip", &["-6", "-o", "addr", "show", "dev", &pair, "scope", "link"]);
        let ready = !listed.contains("tentative") && inside("ip -6 -o addr show dev eth0 scope link").contains("fe80");
        ready.then(|| listed.split_whitespace().nth(3)?.split('/').next().map(str::to_owned)).flatten()
    });
    let again: Vec<_> = forbidden.iter().cloned().chain([(format!("{link_local}%eth0"), listening)]).collect();
    for (address, reached) in again.iter().zip(reach(&server, &again)) {
        assert_ne!(reached, "open", "{address:?}, by the host's filter alone");
    }
    python(
        &server,
        HOST,
        &format!("import socket\nsocket.socket(socket.AF_INET6, socket.SOCK_DGRAM).sendto(b'x', ('ff02::1%eth0', {telling}))"),
    );
    assert!(datagrams.recv(&mut [0; 8]).is_err(), "a multicast datagram reached the host");

    // A forged source address, with root in the network namespace, as an attacker with a kernel exploit has it.
    inside("ip addr add 10.213.255.250/32 dev eth0");
    let forged = format!(
        "import socket; s = socket.socket(); s.bind(('10.213.255.250', 0)); s.settimeout(2); s.connect(('{}', 8099))",
        Neighbour::OWN
    );
    assert!(python(&server, HOST, &forged).contains("Error"), "a forged sender's packets are carried");

    // Neither the host nor a machine that routes through the host can connect to the sandbox.
    assert!(!neighbour.can_connect(&own, &port), "a neighbour reaches the application past the ingress");
    let address = format!("{own}:{port}").parse().expect("an address");
    assert!(std::net::TcpStream::connect_timeout(&address, Duration::from_secs(2)).is_err(), "the host does");
}

/// Tries system calls by number and prints the result of each. For x86-64.
const CALLS: &str = r"
import ctypes, errno, os, socket, subprocess, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(argument) for argument in arguments])
    if result == 0 and number == 56: os._exit(0)
    return 'ALLOWED' if result >= 0 else errno.errorcode[ctypes.get_errno()]
def family(*arguments):
    try: socket.socket(*arguments); return 'ALLOWED'
    except OSError as error: return errno.errorcode[error.errno]
NEWUSER, NEWNS, SIGCHLD = 0x10000000, 0x20000, 17
for name, answer in [
    ('io_uring_setup', call(425, 1, 0)), ('unshare user', call(272, NEWUSER)), ('unshare mounts', call(272, NEWNS)),
    ('clone user', call(56, NEWUSER | SIGCHLD, 0, 0, 0, 0)), ('clone3', call(435, 0, 0)), ('setns', call(308, 0, 0)),
    ('mount', call(165, 0, 0, 0, 0, 0)), ('open_tree', call(428, -100, 0, 0)), ('fsopen', call(430, 0, 0)),
    ('keyctl', call(250, 0, -3, 1)), ('add_key', call(248, 0, 0, 0, 0, -3)), ('request_key', call(249, 0, 0, 0, 0)),
    ('bpf', call(321, 0, 0, 0)), ('perf_event_open', call(298, 0, 0, 0, 0, 0)), ('userfaultfd', call(323, 1)),
    ('open_by_handle_at', call(304, 0, 0, 0)), ('kexec_load', call(246, 0, 0, 0, 0)), ('personality', call(135, 0x40000)),
    ('fanotify_init', call(300, 0, 0)), ('project of a file', call(16, 0, 0x401c5820, 0)), ('terminal', call(16, 0, 0x5412, 0)), ('x32 getpid', call(0x40000027)), ('newer than the list', call(1000)),
    ('vsock', family(40, 1, 0)), ('alg', family(38, 5, 0)), ('packet', family(17, 3, 0)), ('uevents', family(16, 3, 15)),
    ('sctp', family(2, 1, 132)), ('l2tp', family(2, 2, 115)), ('raw', family(2, 3, 1)), ('raw 6', family(10, 3, 58)),
    ('bluetooth', family(31, 3, 0)), ('xdp', family(44, 3, 0)),
]:
    print(f'{name}: {answer}')
print('unshare -Ur:', subprocess.run(['unshare', '-Ur', 'true'], stderr=subprocess.DEVNULL).returncode != 0)
print('filtered:', [line.split()[1] for line in open('/proc/self/status') if line.startswith('Seccomp:')])
print('routes:', family(16, 3, 0), 'pairs:', socket.socketpair() and 'ALLOWED', 'children:', os.waitpid(os.fork() or os._exit(0), 0)[1])
";

fn assert_refused(printed: &str) {
    for (name, errors) in [
        ("clone3", &["ENOSYS"][..]),
        ("x32 getpid", &["ENOSYS"]),
        ("newer than the list", &["ENOSYS"]),
        ("vsock", &["EAFNOSUPPORT"]),
        ("alg", &["EAFNOSUPPORT"]),
        ("packet", &["EAFNOSUPPORT"]),
        ("bluetooth", &["EAFNOSUPPORT"]),
        ("xdp", &["EAFNOSUPPORT"]),
    ] {
        let answer = printed.lines().find_map(|line| line.strip_prefix(&format!("{name}: "))).unwrap_or_default();
        assert!(errors.contains(&answer), "{name}: {answer}\n{printed}");
    }
    for name in
        "io_uring_setup,unshare user,unshare mounts,clone user,setns,mount,open_tree,fsopen,keyctl,add_key,request_key,bpf,\
                 perf_event_open,userfaultfd,open_by_handle_at,kexec_load,personality,fanotify_init,project of a file,terminal,uevents,sctp,l2tp,raw,raw 6"
            .split(',')
    {
        assert!(printed.contains(&format!("{name}: EPERM")), "{name}\n{printed}");
    }
    for line in ["unshare -Ur: True", "filtered: ['2']", "routes: ALLOWED pairs: ALLOWED children: 0"] {
        assert!(printed.contains(line), "{line}\n{printed}");
    }
}

/// The open files of a process.
fn open_files(pid: &str) -> Vec<String> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("it runs").flatten();
    entries.filter_map(|entry| Some(std::fs::read_link(entry.path()).ok()?.display().to_string())).collect()
}

fn system_calls() {
    // A descriptor that the parent of the server left open.
    let marker = tempfile::NamedTempFile::new().expect("a file");
    rustix::io::fcntl_setfd(marker.as_file(), FdFlags::empty()).expect("set");
    let name = marker.path().display().to_string();

    let mut server = Server::default();
    let folder = probe("one");
    let at = folder.path().to_str().expect("a path").to_owned();
    std::fs::write(folder.path().join("calls.py"), CALLS).expect("written");
    let look = "import os\nfor fd in os.listdir('/proc/self/fd'):\n    try: print(os.readlink(f'/proc/self/fd/{fd}'))\n    except OSError: pass\n";
    std::fs::write(folder.path().join("look.py"), look).expect("written");
    let declared = std::fs::read_to_string(folder.path().join("capsule.toml")).expect("there");
    let build = "\n[build]\nbuild = \"python3 calls.py && python3 look.py\"\nrelease = \"python3 calls.py\"\n";
    std::fs::write(folder.path().join("capsule.toml"), declared + build).expect("written");
    let built = server.deploy(folder.path(), "one").ok();
    assert_refused(
        &built.err.lines().map(|line| line.trim_start().to_owned() + "\n").collect::<String>().replace("build │ ", ""),
    );
    assert!(!built.err.contains(&name), "a build has an inherited file open: {built:?}");
    assert_refused(&python(&server, HOST, CALLS));

    // Neither the application nor a process that outlives the server has inherited it.
    let seen = python(&server, HOST, look);
    assert!(seen.contains("socket") && !seen.contains(&name), "{seen}");
    let instance = server.instances(folder.path())[0].clone();
    let pid = instance["pid"].to_string();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let shim = status.lines().find_map(|line| line.strip_prefix("PPid:")).expect("a parent").trim().to_owned();
    let ingress = processes(&format!("ingress --data {}", server.data().display()))[0].to_string();
    for process in [pid, shim, ingress] {
        assert!(!open_files(&process).contains(&name), "{process}: {:?}", open_files(&process));
    }

    // The configuration relaxes the filter for one service, from its next start.
    let service = server.status(folder.path())["service"]["id"].as_str().expect("an id").to_owned();
    server.stop();
    server.add_setting(&format!("sandbox.relax.{service}=io_uring"));
    server.start();
    assert!(server.log_text().contains("are relaxed by the setting sandbox.relax"));
    server.capsule(&["restart", &at]).ok();
    let printed = python(&server, HOST, CALLS);
    assert!(printed.contains("io_uring_setup: EFAULT") && printed.contains("unshare user: EPERM"), "{printed}");
}

fn flood() {
    let server = Server::default();
    let folder = probe("one");
    let at = folder.path().to_str().expect("a path").to_owned();
    server.deploy(folder.path(), "one").ok();
    let instance = server.instances(folder.path())[0].clone();
    let (id, pid) = (text(&instance, "id"), instance["pid"].to_string());
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let shim = status.lines().find_map(|line| line.strip_prefix("PPid:")).expect("a parent").trim().to_owned();
    let groups = std::fs::read_to_string(format!("/proc/{shim}/cgroup")).expect("it runs");
    assert!(groups.contains(&format!("/capsule.{id}")), "the shim is outside of the limits: {groups}");

    // 256 MiB in lines of many lengths. The application is not blocked.
    let code = "import os, threading\n\
                def flood():\n    \
                    for part in [b'y\\n' * 32768, b'x' * 65535 + b'\\n', b'\\xff' * 99 + b'\\n']:\n        \
                        for _ in range((85 << 20) // len(part)): os.write(1, part[:])\n    \
                    os.write(1, b'the flood is over\\n')\n\
                threading.Thread(target=flood).start()";
    python(&server, HOST, code);
    let logs = || server.capsule(&["logs", &at]).ok().out;
    let lines = eventually("a line says how much is missing", || {
        let all = logs();
        all.contains("of output were dropped").then_some(all)
    });
    assert!(lines.contains("bytes) of output were dropped: the limit is 5000 lines and 1024 KiB per second"), "{lines:.2000}");
    eventually("the application is not held up", || (server.get(HOST, "/").body == "version one").then_some(()));
    let kept: u64 = std::fs::read_dir(server.data().join("logs/instances").join(&id))
        .expect("there")
        .flatten()
        .filter_map(|entry| Some(entry.metadata().ok()?.len()))
        .sum();
    assert!(kept <= 33 << 20, "{kept} bytes are kept");
}

fn user_ids() {
    let server = Server::default();
    let token = server.admin();
    let uid = |name: &str| {
        let folder = probe(name);
        server.deploy(folder.path(), name).ok();
        let uid = server.get(&format!("{name}-production.localhost"), "/identity").json()["uid"].as_u64();
        (uid.expect("a number"), server.status(folder.path())["service"]["id"].as_str().expect("an id").to_owned())
    };
    let (first, service) = uid("one");
    let gone = server.api("DELETE", &format!("/services/{service}"), Some(&token), Some(&json!({})));
    assert!(gone.status < 300, "{gone:?}");
    eventually("it is gone", || (server.entries("releases", "") == 0).then_some(()));
    assert!(uid("two").0 > first, "a user id is given out again");
}

fn network_without_root() {
    let server = Server::unprivileged(&[]);
    let folder = probe("one");
    for path in [folder.path().to_path_buf(), folder.path().join("capsule.toml")] {
        std::os::unix::fs::chown(path, Some(65534), Some(65534)).expect("it takes root");
    }
    let neighbour = Neighbour::create();
    let _answering = neighbour.listen(8099);
    server.deploy(folder.path(), "one").ok();
    assert_eq!(server.get(HOST, "/identity").json()["address"], "10.0.2.100");
    assert_eq!(reach(&server, &[(Neighbour::OWN.into(), 8099)]), ["open"], "there is a way out");
    let listener = TcpListener::bind("0.0.0.0:0").expect("it listens");
    let listening = listener.local_addr().expect("an address").port();
    // The last two are addresses of slirp4netns: the host's loopback, and the name server on other ports.
    let host = own_addresses().into_iter().chain(["10.0.2.2", "10.0.2.3", Neighbour::HOST].map(str::to_owned));
    let metadata = Neighbour::METADATA.map(|address| (address.to_owned(), 8099));
    let forbidden: Vec<_> = host.map(|address| (address, listening)).chain(metadata).collect();
    for (address, reached) in forbidden.iter().zip(reach(&server, &forbidden)) {
        assert_ne!(reached, "open", "{address:?}");
    }
    assert_refused(&python(&server, HOST, CALLS));
}

//! The program `larder` as a process: its log in a file, and never left behind.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::{tmp_dir, unique};

/// A running `larder`, killed when this is dropped and by the kernel when the test process is gone.
pub struct LarderProcess {
    child: Child,
    log: PathBuf,
    name: String,
    /// Where it said that it is ready.
    port: Option<u16>,
}

/// Starts `larder` with these arguments, and with `kubeconfig` as its `KUBECONFIG`. The log is in `target/test-logs`.
pub fn larder_process(args: &[&str], kubeconfig: Option<&Path>) -> LarderProcess {
    LarderProcess::start(args, kubeconfig, &[])
}

impl LarderProcess {
    /// As [`larder_process`], with variables of the environment.
    pub fn start(args: &[&str], kubeconfig: Option<&Path>, variables: &[(&str, &str)]) -> LarderProcess {
        let logs = tmp_dir().parent().expect("a target folder").join("test-logs");
        std::fs::create_dir_all(&logs).expect("a folder for logs");
        let what = args.first().copied().unwrap_or("larder");
        let name = format!("{}-{}", what, unique(&std::process::id().to_string()));
        let log = logs.join(format!("{name}.log"));
        let file = File::create(&log).expect("a log file");

        // setpriv becomes larder by exec, so the process that is killed and looked at is larder itself.
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", env!("CARGO_BIN_EXE_larder")])
            .args(args)
            .stdin(Stdio::null())
            .stdout(file.try_clone().expect("a second descriptor"))
            .stderr(file)
            .envs(variables.iter().copied());
        match kubeconfig {
            Some(path) => command.env("KUBECONFIG", path),
            // Never the user's own cluster.
            None => command.env("KUBECONFIG", "/nonexistent/kubeconfig"),
        };
        let child = spawn_that_dies_with_us(command).unwrap_or_else(|error| panic!("larder {args:?}: {error}"));
        LarderProcess {
            child,
            log,
            name,
            port: None,
        }
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where the log is.
    pub fn log_path(&self) -> &Path {
        &self.log
    }

    /// All that it has written so far.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).expect("the log")).into_owned()
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("wait").is_none()
    }

    /// Ends it as a power cut would, with SIGKILL, and waits until it is gone.
    pub fn kill(&mut self) {
        // An error means that it has ended already, which is what is wanted.
        let _ = self.child.kill();
        self.child.wait().expect("wait");
    }

    /// Asks it to end, with SIGTERM. Follow with [`LarderProcess::wait`].
    pub fn terminate(&mut self) {
        let pid = i32::try_from(self.child.id())
            .ok()
            .and_then(Pid::from_raw)
            .expect("a process id");
        kill_process(pid, Signal::TERM).unwrap_or_else(|error| panic!("SIGTERM to {}: {error}", self.name));
    }

    /// Waits until it ends by itself, and fails the test with the end of its log if it doesn't within `timeout`.
    pub fn wait(&mut self, timeout: Duration) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("wait") {
                return status;
            }
            assert!(
                start.elapsed() < timeout,
                "{} still runs after {timeout:?}:\n{}",
                self.name,
                self.log_end()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until `/readyz` on this port of 127.0.0.1 answers 200, and fails the test with the end of the log if the
    /// process ends or needs more than 30 s.
    pub async fn wait_ready(&mut self, port: u16) {
        let start = Instant::now();
        loop {
            // Plain blocking I/O on loopback: an answer takes a fraction of a millisecond.
            let answer = http_status(port, "/readyz");
            if answer.as_ref().is_ok_and(|status| *status == 200) {
                self.port = Some(port);
                return;
            }
            let (name, running) = (self.name.clone(), self.is_running());
            assert!(running, "{name} ended before it was ready:\n{}", self.log_end());
            assert!(
                start.elapsed() < Duration::from_secs(30),
                "{name} is not ready after 30 s ({answer:?}):\n{}",
                self.log_end()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// What a scrape gets of a process that was waited for by [`LarderProcess::wait_ready`]: value by name and labels.
    pub fn metrics(&self) -> BTreeMap<String, f64> {
        let port = self.port.expect("it was ready once");
        let (status, text) = http_get(port, "/metrics").expect("an answer");
        assert_eq!(status, 200, "{text}");
        let samples = text.lines().filter(|line| line.starts_with("larder_"));
        samples
            .map(|line| {
                let (name, value) = line.rsplit_once(' ').expect("a name and a value");
                (name.to_owned(), value.parse().expect("a number"))
            })
            .collect()
    }

    /// The memory that it holds now, in bytes (`VmRSS`).
    pub fn resident_bytes(&self) -> u64 {
        let path = format!("/proc/{}/status", self.child.id());
        let status = std::fs::read_to_string(&path).expect("the process runs");
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("VmRSS");
        let kib = line
            .split_whitespace()
            .nth(1)
            .and_then(|kib| kib.parse::<u64>().ok())
            .expect("a number of kB");
        kib * 1024
    }

    /// The last lines of the log, for a failure's message.
    pub fn log_end(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }
}

impl Drop for LarderProcess {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("--- the end of {}\n{}\n---", self.log.display(), self.log_end());
        }
    }
}

/// A port of 127.0.0.1 that nothing listened on a moment ago.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("its address").port()
}

/// The status of `GET path` on this port of 127.0.0.1.
pub fn http_status(port: u16, path: &str) -> io::Result<u16> {
    http_get(port, path).map(|(status, _)| status)
}

/// The status and the text that `GET path` is answered with.
fn http_get(port: u16, path: &str) -> io::Result<(u16, String)> {
    let limit = Duration::from_secs(5);
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    // HTTP/1.0 has no chunks.
    write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let status = answer.split(' ').nth(1).and_then(|code| code.parse().ok());
    let status = status.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no HTTP status"))?;
    let text = answer.split_once("\r\n\r\n").map_or("", |(_, text)| text);
    Ok((status, text.to_owned()))
}

type Order = (Command, Sender<io::Result<Child>>);

/// The kernel sends the signal when the *thread* that started the process ends, and each test has a thread of its own
/// that may end earlier: so all are started by one thread that lives as long as this process.
fn spawn_that_dies_with_us(command: Command) -> io::Result<Child> {
    static SPAWNER: OnceLock<Mutex<Sender<Order>>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, orders) = channel::<Order>();
        std::thread::spawn(move || {
            for (mut command, answer) in orders {
                // A test that gave up waiting is gone, and the child's guard with it.
                if let Err(unwanted) = answer.send(command.spawn())
                    && let Ok(mut child) = unwanted.0
                {
                    let _ = child.kill();
                    let _ = child.wait();
                }
            }
        });
        Mutex::new(sender)
    });
    let (sender, answer) = channel();
    spawner
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
        .send((command, sender))
        .expect("the spawner runs");
    answer.recv().expect("the spawner answers")
}

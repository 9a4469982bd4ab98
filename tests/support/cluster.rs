//! A real API server, by `hack/cluster run`.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt::Debug;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Container, Namespace, Node, Pod, PodSpec, ServiceAccount};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{ObjectMeta, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config, ResourceExt};
use serde_json::json;

use super::{LarderProcess, StoreDir, eventually, free_port, larder_process, repo, tmp_dir, unique};

/// The namespace of `deploy/`.
pub const SYSTEM_NAMESPACE: &str = "larder-system";
/// The agents' service account in it.
const AGENT: &str = "larder-agent";
/// The controller's service account in it.
const CONTROLLER: &str = "larder-controller";

/// An API server of this test binary's own. It ends with the process, however that ends.
pub struct Cluster {
    dir: PathBuf,
    bin: PathBuf,
    /// The script, which runs for as long as its standard input is open here: until this process is gone.
    _script: Child,
    /// CRDs are installed by one test at a time; the others wait for it.
    installing: tokio::sync::Mutex<Vec<String>>,
    /// Likewise deploy/; true when it is there.
    deployed: tokio::sync::Mutex<bool>,
    /// The one controller process, where tests want one.
    controller: tokio::sync::OnceCell<LarderProcess>,
}

impl Cluster {
    /// The cluster of this test binary, started on first use (about 4 s; minutes when the tools must be built first).
    pub async fn shared() -> &'static Cluster {
        static SHARED: OnceLock<Cluster> = OnceLock::new();
        static STARTING: Mutex<()> = Mutex::new(());
        tokio::task::spawn_blocking(|| {
            // A start that failed must not poison the others' report of their own failure.
            let _one_at_a_time = STARTING.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            SHARED.get_or_init(Cluster::start)
        })
        .await
        .expect("the cluster did not start; see above")
    }

    fn start() -> Cluster {
        // Its progress, of minutes perhaps, is for whoever waits.
        let tools = Command::new(repo().join("hack/build-tools"))
            .stderr(Stdio::inherit())
            .output()
            .expect("hack/build-tools");
        assert!(
            tools.status.success(),
            "hack/build-tools: {}; its messages are above",
            tools.status
        );
        let bin = PathBuf::from(String::from_utf8(tools.stdout).expect("a path in UTF-8").trim_end());

        let dir = tmp_dir().join(format!("cluster-{}", std::process::id()));
        // Another process had this number once, and its machine went down.
        let _ = std::fs::remove_dir_all(&dir);
        let mut command = Command::new(repo().join("hack/cluster"));
        command.arg("run");
        if std::env::var_os("LARDER_KEEP_CLUSTER").is_some() {
            command.arg("--keep");
        }
        // Its errors go where those of the tests go.
        let mut child = command
            .arg(&dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("hack/cluster starts");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("a pipe"))
            .read_line(&mut line)
            .expect("a line of hack/cluster");
        assert!(
            line.starts_with("ready "),
            "hack/cluster did not get ready: {line:?}; its messages are above"
        );
        Cluster {
            dir,
            bin,
            _script: child,
            installing: tokio::sync::Mutex::default(),
            deployed: tokio::sync::Mutex::default(),
            controller: tokio::sync::OnceCell::new(),
        }
    }

    /// The path of the administrator's kubeconfig.
    pub fn kubeconfig(&self) -> PathBuf {
        self.dir.join("kubeconfig")
    }

    /// The administrator's client configuration.
    pub async fn config(&self) -> Config {
        config_of(&self.kubeconfig()).await
    }

    /// A client with all rights. Each test takes its own: a client belongs to the runtime that it was made in.
    pub async fn client(&self) -> Client {
        Client::try_from(self.config().await).expect("a client")
    }

    /// Runs kubectl as administrator. It neither reads nor writes anything of the user's.
    pub fn kubectl<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Output {
        self.kubectl_command(args).output().expect("kubectl starts")
    }

    /// Runs kubectl as administrator with `input` on its standard input.
    pub fn kubectl_with_input<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>, input: &str) -> Output {
        let mut child = self
            .kubectl_command(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("kubectl starts");
        let mut stdin = child.stdin.take().expect("a pipe");
        let input = input.as_bytes().to_vec();
        // kubectl may fill its output before it has read all of this.
        let writer = std::thread::spawn(move || stdin.write_all(&input));
        let output = child.wait_with_output().expect("kubectl ends");
        // One that fails early does not read its input: its own message says more than a broken pipe.
        let _ = writer.join();
        output
    }

    /// Runs kubectl as administrator, requires success, and gives what it printed.
    pub fn kubectl_ok<A: AsRef<OsStr> + Debug>(&self, args: impl IntoIterator<Item = A>) -> String {
        let args: Vec<A> = args.into_iter().collect();
        let output = self.kubectl(&args);
        assert!(
            output.status.success(),
            "kubectl {args:?}: {}\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).expect("kubectl prints UTF-8")
    }

    fn kubectl_command<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Command {
        let mut command = Command::new(self.bin.join("kubectl"));
        command
            .args(args)
            .env("KUBECONFIG", self.kubeconfig())
            .env("KUBECACHEDIR", self.dir.join("kubectl-cache"))
            .env("KUBERC", "off");
        command
    }

    /// Creates a namespace with a new name, and gives the name.
    pub async fn namespace(&self, prefix: &str) -> String {
        let name = unique(prefix);
        self.ensure_namespace(&name).await;
        name
    }

    /// Creates the namespace `name` unless it is there.
    pub async fn ensure_namespace(&self, name: &str) {
        let namespaces = Api::<Namespace>::all(self.client().await);
        let namespace = Namespace {
            metadata: named(name),
            ..Namespace::default()
        };
        created_or_there(namespaces.create(&PostParams::default(), &namespace).await);
    }

    /// Creates a Node with condition Ready=True, or gives the one that is there those labels and that condition.
    pub async fn node(&self, name: &str, labels: &[(&str, &str)]) -> Node {
        let nodes = Api::<Node>::all(self.client().await);
        let labels: BTreeMap<String, String> = labels.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        let mut metadata = named(name);
        metadata.labels = Some(labels.clone());
        created_or_there(
            nodes
                .create(
                    &PostParams::default(),
                    &Node {
                        metadata,
                        ..Node::default()
                    },
                )
                .await,
        );
        let patch = Patch::Merge(json!({"metadata": {"labels": labels}, "spec": {"taints": null}}));
        nodes
            .patch(name, &PatchParams::default(), &patch)
            .await
            .expect("the node's labels");
        self.set_node_ready(name, true).await
    }

    /// Sets the condition Ready of a Node, as its kubelet or the node controller would.
    pub async fn set_node_ready(&self, name: &str, ready: bool) -> Node {
        let nodes = Api::<Node>::all(self.client().await);
        let now = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let (status, reason) = if ready {
            ("True", "KubeletReady")
        } else {
            ("Unknown", "NodeStatusUnknown")
        };
        let patch = json!({"status": {"conditions": [{
            "type": "Ready", "status": status, "reason": reason, "message": "set by a test",
            "lastHeartbeatTime": now, "lastTransitionTime": now,
        }]}});
        nodes
            .patch_status(name, &PatchParams::default(), &Patch::Strategic(patch))
            .await
            .expect("the node's status")
    }

    /// Creates a service account unless it is there.
    pub async fn service_account(&self, namespace: &str, name: &str) {
        let accounts = Api::<ServiceAccount>::namespaced(self.client().await, namespace);
        let account = ServiceAccount {
            metadata: named(name),
            ..ServiceAccount::default()
        };
        created_or_there(accounts.create(&PostParams::default(), &account).await);
    }

    /// Creates a Pod object on a node, which nothing runs: a token can be bound to it.
    pub async fn pod(&self, namespace: &str, name: &str, service_account: &str, node: &str) -> Pod {
        let pods = Api::<Pod>::namespaced(self.client().await, namespace);
        let pod = Pod {
            metadata: named(name),
            spec: Some(PodSpec {
                service_account_name: Some(service_account.to_string()),
                node_name: Some(node.to_string()),
                containers: vec![Container {
                    name: "none".to_string(),
                    image: Some("none:latest".to_string()),
                    ..Container::default()
                }],
                ..PodSpec::default()
            }),
            ..Pod::default()
        };
        pods.create(&PostParams::default(), &pod).await.expect("a pod object")
    }

    /// A token of a service account, bound to a Pod object when one is named, as the kubelet gives it to that pod.
    pub fn service_account_token(&self, namespace: &str, account: &str, bound_pod: Option<&str>) -> String {
        let mut args = vec!["create", "token", account, "--namespace", namespace];
        if let Some(pod) = bound_pod {
            args.extend(["--bound-object-kind", "Pod", "--bound-object-name", pod]);
        }
        self.kubectl_ok(&args).trim_end().to_string()
    }

    /// A kubeconfig with a service account's token, for a process of its own.
    pub fn service_account_kubeconfig(&self, namespace: &str, account: &str, bound_pod: Option<&str>) -> PathBuf {
        let token = self.service_account_token(namespace, account, bound_pod);
        let text = std::fs::read_to_string(self.kubeconfig()).expect("the admin's kubeconfig");
        let mut config: serde_json::Value = serde_yaml::from_str(&text).expect("a kubeconfig");
        config["users"][0]["user"] = json!({"token": token});
        config["contexts"][0]["context"]["namespace"] = json!(namespace);
        // JSON is YAML. The folder is the cluster's own and goes with it.
        let folder = self.dir.join("kubectl-cache");
        std::fs::create_dir_all(&folder).expect("a folder for kubeconfigs");
        let path = folder.join(unique(account));
        std::fs::write(&path, config.to_string()).expect("a kubeconfig");
        path
    }

    /// A client that acts as a service account, with a token bound to a Pod object when one is named.
    pub async fn service_account_client(&self, namespace: &str, account: &str, bound_pod: Option<&str>) -> Client {
        let path = self.service_account_kubeconfig(namespace, account, bound_pod);
        Client::try_from(config_of(&path).await).expect("a client")
    }

    /// Installs larder's own CRDs. Once per cluster: later calls return at once.
    pub async fn larder_crds(&self) {
        self.install_crds(larder::api::crds()).await;
    }

    /// Applies `deploy/` with its RBAC and admission policies, and waits until the policies are in force. Nothing runs
    /// the controller and the agents of it here. Once per cluster: later calls return at once.
    pub async fn deploy(&self) {
        self.larder_crds().await;
        let mut deployed = self.deployed.lock().await;
        if *deployed {
            return;
        }
        self.kubectl_ok([
            "apply",
            "--server-side",
            "--force-conflicts",
            "-k",
            &repo().join("deploy").to_string_lossy(),
        ]);
        // An unbound token may write nothing: the refusal shows that the policies act.
        let client = self.service_account_client(SYSTEM_NAMESPACE, AGENT, None).await;
        let leases = Api::<Lease>::namespaced(client, SYSTEM_NAMESPACE);
        let lease = Lease {
            metadata: named("policy-probe"),
            ..Lease::default()
        };
        let dry_run = PostParams {
            dry_run: true,
            ..PostParams::default()
        };
        eventually(
            Duration::from_secs(20),
            "the admission policies act",
            async || match leases.create(&dry_run, &lease).await {
                Err(error) if error.to_string().contains("not bound to a node") => Ok(()),
                other => Err(format!("{other:?}")),
            },
        )
        .await;
        *deployed = true;
    }

    /// A client that acts as the agent of a node, as `deploy/` gives it: RBAC, admission policies and a token that is
    /// bound to a Pod object on the node, which must exist.
    pub async fn agent_client(&self, node: &str) -> Client {
        Client::try_from(config_of(&self.agent_kubeconfig(node).await).await).expect("a client")
    }

    /// As [`Cluster::agent_client`], a kubeconfig for `larder agent`.
    pub async fn agent_kubeconfig(&self, node: &str) -> PathBuf {
        self.deploy().await;
        let pod = unique("agent");
        self.pod(SYSTEM_NAMESPACE, &pod, AGENT, node).await;
        self.service_account_kubeconfig(SYSTEM_NAMESPACE, AGENT, Some(&pod))
    }

    /// A client that acts as the controller of `deploy/`.
    pub async fn controller_client(&self) -> Client {
        Client::try_from(config_of(&self.controller_kubeconfig().await).await).expect("a client")
    }

    /// As [`Cluster::controller_client`], a kubeconfig for `larder controller`.
    pub async fn controller_kubeconfig(&self) -> PathBuf {
        self.deploy().await;
        self.service_account_kubeconfig(SYSTEM_NAMESPACE, CONTROLLER, None)
    }

    /// The `larder controller` of this cluster, with the rights of `deploy/`: one for all tests of the binary, since only
    /// one leads. It is ready when this returns, and ends with the test process.
    pub async fn controller_process(&self) -> &LarderProcess {
        let start = async || {
            let (kubeconfig, port) = (self.controller_kubeconfig().await, free_port());
            let listen = format!("127.0.0.1:{port}");
            let args = [
                "controller",
                "--namespace",
                SYSTEM_NAMESPACE,
                "--listen",
                &listen,
                "--log-format",
                "text",
            ];
            let mut process = larder_process(&args, Some(&kubeconfig));
            process.wait_ready(port).await;
            process
        };
        self.controller.get_or_init(start).await
    }

    /// A `larder agent` with the rights of `deploy/` for this node, whose Node must exist, over a store of its own.
    /// `roots` are its values of `--source-root`. It is ready when this returns.
    pub async fn agent_process(&self, node: &str, store: &StoreDir, roots: &[String], more: &[&str]) -> LarderProcess {
        let (kubeconfig, port) = (self.agent_kubeconfig(node).await, free_port());
        let listen = format!("127.0.0.1:{port}");
        let root = store.path().join("store").to_string_lossy().into_owned();
        let mut args = vec![
            "agent",
            "--node-name",
            node,
            "--root",
            &root,
            "--namespace",
            SYSTEM_NAMESPACE,
        ];
        args.extend(["--listen", &listen, "--log-format", "text"]);
        for allowed in roots {
            args.extend(["--source-root", allowed]);
        }
        args.extend(more);
        let mut process = larder_process(&args, Some(&kubeconfig));
        process.wait_ready(port).await;
        process
    }

    /// Applies the CRDs and waits until they are Established. Once per cluster and CRD: later calls return at once.
    pub async fn install_crds(&self, crds: Vec<CustomResourceDefinition>) {
        let mut installed = self.installing.lock().await;
        let api = Api::<CustomResourceDefinition>::all(self.client().await);
        for crd in crds {
            let name = crd.name_any();
            if installed.contains(&name) {
                continue;
            }
            let params = PatchParams::apply("larder-tests").force();
            api.patch(&name, &params, &Patch::Apply(&crd))
                .await
                .unwrap_or_else(|error| panic!("CRD {name}: {error}"));
            eventually(
                Duration::from_secs(20),
                &format!("CRD {name} Established"),
                async || {
                    let crd = api.get(&name).await.map_err(|error| error.to_string())?;
                    let conditions = crd.status.and_then(|status| status.conditions).unwrap_or_default();
                    match conditions
                        .iter()
                        .find(|c| c.type_ == "Established" && c.status == "True")
                    {
                        Some(_) => Ok(()),
                        None => Err(format!("{conditions:?}")),
                    }
                },
            )
            .await;
            installed.push(name);
        }
    }
}

async fn config_of(kubeconfig: &Path) -> Config {
    let kubeconfig = Kubeconfig::read_from(kubeconfig).expect("a kubeconfig");
    Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
        .await
        .expect("a client configuration")
}

fn named(name: &str) -> ObjectMeta {
    ObjectMeta {
        name: Some(name.to_string()),
        ..ObjectMeta::default()
    }
}

fn created_or_there<K>(result: kube::Result<K>) {
    match result {
        Ok(_) => {}
        Err(kube::Error::Api(status)) if status.is_already_exists() => {}
        Err(error) => panic!("{error}"),
    }
}

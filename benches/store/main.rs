mod disk;
#[path = "../support/goals.rs"]
mod goals;
mod run;
use larder::store::*;
use std::path::Path;
use std::process::Command;
fn child(args: &[String]) {
    let store = Store::open(Path::new(&args[1]), Options::default()).unwrap();
    let t = std::time::Instant::now();
    let dir = larder::source::SourceDir::open(&store, Path::new(&args[2])).unwrap();
    let rev = larder::source::build_directory(
        &store,
        &dir,
        &Default::default(),
        Publish {
            name: RefName::new("default", "x").unwrap(),
            owner: "x".into(),
            generation: 0,
            request: None,
            source: serde_json::Value::Null,
            history_limit: 3,
            now: std::time::SystemTime::now(),
        },
        &std::sync::atomic::AtomicBool::new(false),
    )
    .unwrap();
    eprintln!("all {:?} {}", t.elapsed(), rev.files);
}
fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|a| a == "build") {
        return child(&args);
    }
    disk::private_mounts();
    let dir = goals::work_dir("store");
    for kind in ["ext4", "xfs"] {
        let d = disk::Disk::new(&dir, kind);
        let c = d.root.join("corpus");
        println!("{kind} {:?}", disk::corpus(&c));
        run::run(
            Command::new("sh")
                .arg("-c")
                .arg(format!("tar cf - {} | wc -c", c.display())),
            &d.root,
        );
        let me = std::env::current_exe().unwrap();
        for _ in 0..2 {
            let s = d.root.join("store");
            println!(
                "larder {:?}",
                run::run(Command::new(&me).arg("build").arg(&s).arg(&c), &d.root)
            );
            println!("{}", std::fs::read_to_string(d.root.join("stderr")).unwrap());
            println!(
                "larder again {:?}",
                run::run(Command::new(&me).arg("build").arg(&s).arg(&c), &d.root)
            );
            println!("{}", std::fs::read_to_string(d.root.join("stderr")).unwrap());
            println!(
                "cp {:?}",
                run::run(Command::new("cp").arg("-a").arg(&c).arg(d.root.join("copy")), &d.root)
            );
            println!(
                "find {:?}",
                run::run(Command::new("find").arg(&c).args(["-size", "-0"]), &d.root)
            );
            println!(
                "sha {:?}",
                run::run(
                    Command::new("sh").arg("-c").arg(format!(
                        "find {} -type f -print0 | xargs -0 -P2 -n 200 sha256sum",
                        c.display()
                    )),
                    &d.root
                )
            );
            let r = d.root.join("restic");
            let restic = |a: &[&str]| {
                let mut x = Command::new("restic");
                x.env("RESTIC_PASSWORD", "x")
                    .arg("-r")
                    .arg(&r)
                    .arg("--cache-dir")
                    .arg(d.root.join("rc"))
                    .args(a);
                x
            };
            run::run(&mut restic(&["init"]), &d.root);
            println!(
                "restic {:?}",
                run::run(restic(&["backup", "--compression", "off"]).arg(&c), &d.root)
            );
            println!(
                "restic again {:?}",
                run::run(restic(&["backup", "--compression", "off"]).arg(&c), &d.root)
            );
            let b = d.root.join("borg");
            let borg = |a: &[&str]| {
                let mut x = Command::new("borg");
                x.env("BORG_BASE_DIR", d.root.join("bb"))
                    .env("BORG_REPO", &b)
                    .env("BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK", "yes")
                    .args(a);
                x
            };
            run::run(&mut borg(&["init", "-e", "none"]), &d.root);
            println!(
                "borg {:?}",
                run::run(borg(&["create", "-C", "none", "::1"]).arg(&c), &d.root)
            );
            println!(
                "borg again {:?}",
                run::run(borg(&["create", "-C", "none", "::2"]).arg(&c), &d.root)
            );
            let o = d.root.join("ostree");
            let ostree = |a: &[&str]| {
                let mut x = Command::new("ostree");
                x.arg(format!("--repo={}", o.display())).args(a);
                x
            };
            run::run(&mut ostree(&["init", "--mode=bare"]), &d.root);
            println!(
                "ostree {:?}",
                run::run(
                    ostree(&["commit", "-b", "x"]).arg(format!("--tree=dir={}", c.display())),
                    &d.root
                )
            );
            println!(
                "ostree again {:?}",
                run::run(
                    ostree(&["commit", "-b", "x"]).arg(format!("--tree=dir={}", c.display())),
                    &d.root
                )
            );
            let ca = d.root.join("casync");
            std::fs::create_dir(&ca).unwrap();
            let casync = || {
                let mut x = Command::new("casync");
                x.arg("make")
                    .arg(format!("--store={}", ca.join("s.castr").display()))
                    .arg("--compression=zstd")
                    .arg(ca.join("i.caidx"))
                    .arg(&c);
                x
            };
            println!("casync {:?}", run::run(&mut casync(), &d.root));
            println!("casync again {:?}", run::run(&mut casync(), &d.root));
            for x in ["store", "copy", "restic", "borg", "ostree", "casync", "rc", "bb"] {
                let _ = std::fs::remove_dir_all(d.root.join(x));
            }
            rustix::fs::sync();
        }
    }
}

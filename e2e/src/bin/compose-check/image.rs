use std::{
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::Context;
use devstack::{
    failure::{Exit, Failure},
    progress::{Progress, seconds},
};

use crate::{cli::Cli, docker::Docker};

/// The product's image, under a name that no other has.
pub(crate) const NAME: &str = "shipments:compose-check";
/// The one with the load test.
pub(crate) const LOAD_NAME: &str = "shipments-load:compose-check";

const DEADLINE: Duration = Duration::from_secs(60 * 60);
/// What each of the Dockerfile's last stages takes from a stage that compiles.
const STAGES: [Stage; 2] = [
    Stage {
        name: "services",
        compiled_in: "build",
        binaries: &["logistics-svc", "commerce-consumer"],
    },
    Stage {
        name: "load",
        compiled_in: "build-load",
        binaries: &["loadtest"],
    },
];

struct Stage {
    name: &'static str,
    compiled_in: &'static str,
    binaries: &'static [&'static str],
}

/// Builds it from the Dockerfile, and with `load` the one of the load test; of `prebuilt` images only their last stages, from the
/// binaries in `target/release`.
pub(crate) async fn build(
    docker: &Docker,
    root: &Path,
    contexts: &Path,
    cli: &Cli,
    progress: &Progress,
) -> anyhow::Result<()> {
    let stages = if cli.load { &STAGES[..] } else { &STAGES[..1] };
    let context = if cli.prebuilt {
        let context = contexts.join("prebuilt");
        prepare(docker, root, &context, stages).await?;
        context
    } else {
        root.to_owned()
    };
    let dockerfile = context.join("Dockerfile");
    let base = docker.size("debian:bookworm-slim").await? as f64 / 1e6;
    for (stage, name) in stages.iter().zip([NAME, LOAD_NAME]) {
        let step = progress.step(format!("building the image {name}"));
        let start = Instant::now();
        docker
            .build(name, Some(stage.name), &dockerfile, &context, DEADLINE)
            .await?;
        let megabytes = docker.size(name).await? as f64 / 1e6;
        let took = seconds(start.elapsed());
        step.done(&format!("{name} built: {megabytes:.0} MB, {base:.0} MB of it the base"));
        progress.note(&format!("  the build took {took}"));
    }
    Ok(())
}

async fn prepare(docker: &Docker, root: &Path, context: &Path, stages: &[Stage]) -> anyhow::Result<()> {
    if context.exists() {
        fs::remove_dir_all(context).context("remove the remains of a build")?;
    }
    fs::create_dir_all(context.join("compose")).with_context(|| format!("create {}", context.display()))?;
    for name in stages.iter().flat_map(|stage| stage.binaries) {
        let binary = root.join("target/release").join(name);
        if !binary.is_file() {
            return Err(Failure::new(
                Exit::Usage,
                format!("--prebuilt: there is no {}", binary.display()),
                "cargo build --release --locked --workspace --bins",
            )
            .into());
        }
        let mut strip = Command::new("strip");
        strip.args(["--strip-debug", "-o"]).arg(context.join(name)).arg(binary);
        docker.run("strip", strip, DEADLINE).await?;
    }
    fs::copy(root.join("compose/ready"), context.join("compose/ready")).context("copy compose/ready")?;
    let dockerfile = fs::read_to_string(root.join("Dockerfile")).context("read the Dockerfile")?;
    fs::write(context.join("Dockerfile"), last_stages(&dockerfile, stages)?).context("write a Dockerfile")
}

/// Those stages, with the binaries of the context where they expect those of the stages before.
fn last_stages(dockerfile: &str, stages: &[Stage]) -> anyhow::Result<String> {
    let mut text = String::new();
    for Stage {
        name,
        compiled_in,
        binaries,
    } in stages
    {
        let head = format!(" AS {name}");
        let stage = dockerfile
            .split("\nFROM ")
            .find(|stage| stage.lines().next().is_some_and(|line| line.ends_with(&head)));
        let stage = stage.with_context(|| format!("the Dockerfile has no stage {name}"))?;
        let binaries = binaries.join(" ");
        text.push_str(&format!(
            "FROM scratch AS {compiled_in}\nCOPY {binaries} /source/target/release/\nFROM {stage}\n"
        ));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_stages_take_the_binaries_from_where_they_are_put() {
        let dockerfile = include_str!("../../../../Dockerfile");
        let text = last_stages(dockerfile, &STAGES).unwrap();
        for stage in &STAGES {
            let from = format!("COPY --from={} ", stage.compiled_in);
            let copied: Vec<&str> = text.lines().filter(|line| line.starts_with(&from)).collect();
            assert_eq!(copied.len(), 1, "{text}");
            for name in stage.binaries {
                assert!(copied[0].contains(&format!("/source/target/release/{name}")), "{text}");
            }
        }
        assert_eq!(text.matches("FROM ").count(), 2 * STAGES.len(), "{text}");
        assert!(!text.contains("cargo"), "{text}");
    }
}

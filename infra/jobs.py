"""What runs from time to time: training, engines, the index, evaluation, load.

Every job is a CronJob, so that an update of the stack starts none; all but the evaluation are suspended, and an
operator starts one with `kubectl -n rankbridge-jobs create job --from=cronjob/training training-1`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import pulumi
import pulumi_kubernetes as k8s
from pulumi import Input, Output, ResourceOptions

from infra import pods, serving
from infra.apps_config import AppsConfig, Image, Resources, Role, SiteSettings
from infra.edges import JOBS, LOCUST_PORT, TORCHRUN_PORT, Party
from infra.iam import Role as AwsRole
from infra.pods import Access, mount, variable
from infra.service import claim_spec
from workloads.contract.sites import PORTS, Listener

HOME: Final = "/var/lib/rankbridge/home"
TRAINING: Final = f"{HOME}/aws/training"
"""Where the desk looks for what training and export make."""
ENGINES: Final = "/var/lib/rankbridge/engines"
"""Of the job that builds TensorRT plans: fetched bundles, and what is made of them."""
KEY: Final = "/var/run/rankbridge/publisher"
NEVER: Final = "0 0 1 1 *"
"""A schedule for what is suspended anyway."""
# A node of four processors and 16 GiB has 3.5 and 14.8 left for pods (infra.cluster's reservations); this has to fit.
_HEAVY: Final = Resources("3", "12Gi", "4", "40Gi")
_LIGHT: Final = Resources("500m", "2Gi", "2", "8Gi")
_DAY_S: Final = 86_400

UPLOAD: Final = (
    "import boto3, pathlib, sys\n"
    "bucket, root, prefix = sys.argv[1:]\n"
    "for path in sorted(p for p in pathlib.Path(root).rglob('*') if p.is_file()):\n"
    "    boto3.client('s3').upload_file(str(path), bucket, f'{prefix}/{path.relative_to(root)}')\n"
)
"""Brings a folder into the data bucket's candidates: bucket, folder, prefix."""


@dataclasses.dataclass(frozen=True)
class JobsArgs:
    """What the jobs are made from."""

    config: AppsConfig
    data_bucket: Input[str]
    models_bucket: Input[str]
    policy: Callable[[Party, str], Output[Any]]
    access: Callable[[AwsRole], Access]


@dataclasses.dataclass(frozen=True)
class _Job:
    """One kind of job: its steps come one after the other, the last is the job itself."""

    name: str
    party: Party
    site: SiteSettings
    steps: Sequence[k8s.core.v1.ContainerArgs]
    volumes: Sequence[k8s.core.v1.VolumeArgs]
    pods: int = 1
    schedule: str = ""
    """Empty for a job that is started by hand."""
    gpu_type: str = ""
    gpus: bool = False
    limit_s: int = _DAY_S


class Jobs(pulumi.ComponentResource):
    """Every job of a stack."""

    def __init__(self, name: str, args: JobsArgs, opts: ResourceOptions | None = None) -> None:
        super().__init__("rankbridge:apps:Jobs", name, None, opts)
        self._args, self._config = args, args.config
        self._child = ResourceOptions(parent=self)
        self._there = self._config.site(self._config.jobs.site)
        k8s.core.v1.ServiceAccount(
            "jobs",
            metadata=self._meta("jobs"),
            automount_service_account_token=False,
            opts=self._child,
        )
        self._trust()
        self._training()
        self._index()
        for gpu_type in self._config.jobs.gpu_types:
            self._engine(gpu_type)
        self._evaluation()
        self._load()
        places = {Party.INDEX: self._config.home, Party.EVALUATION: self._config.home}
        for party in (
            Party.TRAINING,
            Party.INDEX,
            Party.TENSORRT,
            Party.EVALUATION,
            Party.LOAD_MASTER,
            Party.LOAD_WORKER,
        ):
            site = places.get(party, self._there).name
            k8s.networking.v1.NetworkPolicy(
                party.value,
                metadata=self._meta(party.value, pods.labels(party.value, site)),
                spec=args.policy(party, site),
                opts=self._child,
            )
        self.register_outputs({})

    def _meta(
        self, name: str, labels: Mapping[str, str] | None = None, **annotations: str
    ) -> k8s.meta.v1.ObjectMetaArgs:
        return k8s.meta.v1.ObjectMetaArgs(
            name=name, namespace=JOBS, labels=dict(labels or pods.MANAGED), annotations=annotations or None
        )

    def _trust(self) -> None:
        k8s.core.v1.ConfigMap(
            f"jobs-{serving.SIGNERS}",
            metadata=self._meta(serving.SIGNERS),
            data={f"{name}.pub": key for name, key in self._config.signers.items()},
            opts=self._child,
        )

    def _step(
        self,
        name: str,
        image: Image,
        command: Sequence[Input[str]],
        resources: Resources,
        role: AwsRole | None,
        *,
        mounts: Sequence[k8s.core.v1.VolumeMountArgs] = (),
        gpu: bool = False,
        ports: Mapping[str, int] | None = None,
    ) -> k8s.core.v1.ContainerArgs:
        access = None if role is None else self._args.access(role)
        job = k8s.core.v1.EnvVarSourceArgs(
            field_ref=k8s.core.v1.ObjectFieldSelectorArgs(field_path="metadata.labels['batch.kubernetes.io/job-name']")
        )
        return pods.container(
            name,
            self._config.images[image],
            command,
            resources,
            env=[
                variable("PYTHONUNBUFFERED", "1"),
                variable("RANKBRIDGE_HOME", HOME),
                variable("HOME", pods.SCRATCH),
                k8s.core.v1.EnvVarArgs(name="JOB_NAME", value_from=job),
                *(access.env() if access else ()),
            ],
            mounts=[mount("tmp", pods.SCRATCH), *mounts],
            extended={self._config.gpu.resource: "1"} if gpu else None,
            ports=ports,
        )

    def _training(self) -> None:
        """Train on the replica, export, and leave the bundle among the candidates: signing it is home's business."""
        jobs, args = self._config.jobs, self._args
        home = [mount("home", HOME)]
        train = self._step(
            "train",
            Image.TRAINING,
            [
                "torchrun",
                f"--nnodes={jobs.workers}",
                "--nproc-per-node=1",
                "--node-rank=$(JOB_COMPLETION_INDEX)",
                f"--master-addr=$(JOB_NAME)-0.training.{JOBS}.svc",
                f"--master-port={TORCHRUN_PORT}",
                "-m",
                "workloads.training",
                *("--replica", jobs.dataset, "--data-bucket", args.data_bucket, "--home", TRAINING, "--confine=try"),
            ],
            _HEAVY,
            AwsRole.TRAINER,
            mounts=home,
            gpu=True,
        )
        # There is one of each in a new home: the shell's patterns name them.
        export = self._step(
            "export",
            Image.TRAINING,
            [
                "sh",
                "-ec",
                f"exec python -m workloads.export --home {TRAINING} --confine=try "
                f"--training {TRAINING}/work/train-* --dataset {TRAINING}/replica/{jobs.dataset}-*",
            ],
            _HEAVY,
            None,
            mounts=home,
        )
        upload = self._upload(f"{TRAINING}/bundles", "candidates/bundles", home)
        k8s.core.v1.Service(
            "training",
            metadata=self._meta("training", pods.labels(Party.TRAINING.value, self._there.name)),
            spec=k8s.core.v1.ServiceSpecArgs(
                cluster_ip="None",
                publish_not_ready_addresses=True,  # workers meet while none of them is ready
                selector=pods.selector(Party.TRAINING.value, self._there.name),
                ports=[k8s.core.v1.ServicePortArgs(name="torchrun", port=TORCHRUN_PORT)],
            ),
            opts=self._child,
        )
        self._declare(
            _Job(
                "training",
                Party.TRAINING,
                self._there,
                [train, export, upload],
                [pods.scratch("home", "40Gi"), *args.access(AwsRole.TRAINER).volumes()],
                pods=jobs.workers,
                gpus=True,
            ),
            args.access(AwsRole.TRAINER),
        )

    def _upload(
        self, folder: str, prefix: str, mounts: Sequence[k8s.core.v1.VolumeMountArgs]
    ) -> k8s.core.v1.ContainerArgs:
        command = ["python", "-c", UPLOAD, self._args.data_bucket, folder, prefix]
        return self._step("upload", Image.TRAINING, command, _LIGHT, AwsRole.TRAINER, mounts=mounts)

    def _publisher(self) -> k8s.core.v1.VolumeArgs:
        """The private key of the publisher: a secret that the operator makes."""
        return k8s.core.v1.VolumeArgs(
            name="publisher",
            secret=k8s.core.v1.SecretVolumeSourceArgs(
                secret_name="publisher",  # noqa: S106 -- its name, no password
                default_mode=0o440,
            ),
        )

    def _index(self) -> None:
        """New items into what a channel serves: their vectors, the index, the tables; as a signed delta."""
        args, home = self._args, self._config.home
        k8s.core.v1.PersistentVolumeClaim(
            "items",
            metadata=self._meta("items", None, **{"pulumi.com/skipAwait": "true"}),
            spec=claim_spec(home.storage_class, "5Gi"),
            opts=self._child,
        )
        claim = k8s.core.v1.PersistentVolumeClaimVolumeSourceArgs(claim_name="items")
        step = self._step(
            "index",
            Image.TRAINING,
            serving.module(
                "delta",
                *("add", "--work", f"{HOME}/deltas", "--items", "/items/items.parquet"),
                *("--channel", self._config.channel, "--models-bucket", args.models_bucket),
                *("--key", f"{KEY}/publisher.key", "--trust", serving.TRUST_DIR, "--actor", "index"),
            ),
            _LIGHT,
            AwsRole.PUBLISHER,
            mounts=[
                mount("home", HOME),
                mount("items", "/items", read_only=True),
                mount("publisher", KEY, read_only=True),
                mount("trust", serving.TRUST_DIR, read_only=True),
            ],
        )
        self._declare(
            _Job(
                "index",
                Party.INDEX,
                home,
                [step],
                [
                    pods.scratch("home", "8Gi"),
                    k8s.core.v1.VolumeArgs(name="items", persistent_volume_claim=claim),
                    pods.config_volume("trust", serving.SIGNERS),
                    self._publisher(),
                    *args.access(AwsRole.PUBLISHER).volumes(),
                ],
                limit_s=3_600,
            ),
            args.access(AwsRole.PUBLISHER),
        )

    def _engine(self, gpu_type: str) -> None:
        """A TensorRT plan of what the channel serves, for one GPU type: no other type can run it."""
        args = self._args
        work = [mount("work", ENGINES)]
        fetch = self._step(
            "fetch",
            Image.AGENT,
            serving.module(
                "agent",
                *("fetch", "--channel", self._config.channel, "--models-bucket", args.models_bucket),
                *("--trust", serving.TRUST_DIR, "--site-dir", ENGINES),
            ),
            _LIGHT,
            AwsRole.TRAINER,
            mounts=[*work, mount("trust", serving.TRUST_DIR, read_only=True)],
        )
        script = (
            f"for model in {ENGINES}/bundles/*/ranker.onnx; do "
            f'out={ENGINES}/plans/$(basename "$(dirname "$model")")/{gpu_type}; mkdir -p "$out"; '
            'trtexec --onnx="$model" --saveEngine="$out/ranker.plan" --fp16; done'
        )
        build = self._step("build", Image.TENSORRT, ["sh", "-ec", script], _HEAVY, None, mounts=work, gpu=True)
        upload = self._upload(f"{ENGINES}/plans", "candidates/engines", work)
        self._declare(
            _Job(
                f"tensorrt-{gpu_type.replace('.', '-')}",
                Party.TENSORRT,
                self._there,
                [fetch, build, upload],
                [
                    pods.scratch("work", "8Gi"),
                    pods.config_volume("trust", serving.SIGNERS),
                    *args.access(AwsRole.TRAINER).volumes(),
                ],
                gpu_type=gpu_type,
                gpus=True,
                limit_s=7_200,
            ),
            args.access(AwsRole.TRAINER),
        )

    def _evaluation(self) -> None:
        """A small training on the newest replica, judged against popularity and kNN: tells when data went bad."""
        jobs, args = self._config.jobs, self._args
        step = self._step(
            "evaluate",
            Image.TRAINING,
            serving.module(
                "training",
                *("--replica", jobs.dataset, "--data-bucket", args.data_bucket),
                *("--home", TRAINING, "--confine=try", "--small"),
            ),
            Resources("2", "8Gi", "4", "20Gi"),
            AwsRole.TRAINER,
            mounts=[mount("home", HOME)],
        )
        self._declare(
            _Job(
                "evaluation",
                Party.EVALUATION,
                self._config.home,
                [step],
                [pods.scratch("home", "20Gi"), *args.access(AwsRole.TRAINER).volumes()],
                schedule=jobs.evaluation,
                limit_s=14_400,
            ),
            args.access(AwsRole.TRAINER),
        )

    def _load(self) -> None:
        """Locust from inside the cluster: a master, and workers that find it by its Service."""
        site, workers = self._there, self._config.jobs.load_workers
        k8s.core.v1.Service(
            "load",
            metadata=self._meta(
                "load",
                pods.labels(Party.LOAD_MASTER.value, site.name),
                # Nobody stands behind it until somebody starts the jobs: an update must not wait for them.
                **{"pulumi.com/skipAwait": "true"},
            ),
            spec=k8s.core.v1.ServiceSpecArgs(
                type="ClusterIP",
                selector=pods.selector(Party.LOAD_MASTER.value, site.name),
                ports=[k8s.core.v1.ServicePortArgs(name="locust", port=LOCUST_PORT, target_port="locust")],
            ),
            opts=self._child,
        )
        gateway = f"http://{serving.host(site.name, Role.GATEWAY)}:{PORTS[Listener.GATEWAY]}"
        common: list[Input[str]] = ["locust", "-f", "/app/loadtests/mix.py", "--host", gateway]
        alone = ["--headless", "--users", "60", "--spawn-rate", "60", "--run-time", "125s"]
        master = self._step(
            "master",
            Image.LOAD,
            [*common, "--master", "--expect-workers", str(workers), *alone],
            _LIGHT,
            None,
            ports={"locust": LOCUST_PORT},
        )
        worker = self._step(
            "worker",
            Image.LOAD,
            [*common, "--worker", "--master-host", f"load.{JOBS}.svc", "--master-port", str(LOCUST_PORT)],
            _LIGHT,
            None,
        )
        self._declare(_Job("load-master", Party.LOAD_MASTER, site, [master], [], limit_s=3_600))
        self._declare(_Job("load-workers", Party.LOAD_WORKER, site, [worker], [], pods=workers, limit_s=3_600))

    def _declare(self, job: _Job, access: Access | None = None) -> None:
        labels = pods.labels(job.party.value, job.site.name)
        excused = {
            "pod-probes": "a job answers nobody: it ends",
        }
        affinity = pods.on_nodes_of(job.site, gpus=job.gpus)
        selector = {"rankbridge.io/gpu-type": job.gpu_type} if job.gpu_type else None
        template = k8s.core.v1.PodTemplateSpecArgs(
            metadata=k8s.meta.v1.ObjectMetaArgs(labels=labels, annotations=pods.exceptions(excused)),
            spec=k8s.core.v1.PodSpecArgs(
                restart_policy="Never",
                service_account_name="jobs",
                automount_service_account_token=False,
                enable_service_links=False,
                security_context=pods.security(),
                priority_class_name="rankbridge-jobs",
                runtime_class_name="nvidia" if job.gpus else None,
                subdomain="training" if job.party is Party.TRAINING else None,
                affinity=affinity,
                node_selector=selector,
                tolerations=pods.tolerations(job.site, waits_s=300),
                init_containers=[*(access.init() if access else ()), *job.steps[:-1]],
                containers=[job.steps[-1]],
                volumes=[pods.scratch("tmp", "2Gi"), *job.volumes],
            ),
        )
        indexed = job.pods > 1 or job.party is Party.TRAINING
        k8s.batch.v1.CronJob(
            job.name,
            metadata=self._meta(job.name, labels, **pods.exceptions(excused)),
            spec=k8s.batch.v1.CronJobSpecArgs(
                schedule=job.schedule or NEVER,
                suspend=not job.schedule,
                concurrency_policy="Forbid",
                starting_deadline_seconds=3_600,
                successful_jobs_history_limit=1,
                failed_jobs_history_limit=3,
                job_template=k8s.batch.v1.JobTemplateSpecArgs(
                    metadata=k8s.meta.v1.ObjectMetaArgs(labels=labels),
                    spec=k8s.batch.v1.JobSpecArgs(
                        completion_mode="Indexed" if indexed else "NonIndexed",
                        completions=job.pods,
                        parallelism=job.pods,
                        backoff_limit=2,
                        active_deadline_seconds=job.limit_s,
                        ttl_seconds_after_finished=_DAY_S,
                        template=template,
                    ),
                ),
            ),
            opts=self._child,
        )

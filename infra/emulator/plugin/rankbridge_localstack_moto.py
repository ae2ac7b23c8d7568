"""Gives LocalStack the services that its free edition lacks and the moto inside it has.

Every operation of a service goes to LocalStack's own `call_moto`, in the same process and with the same state: an Auto
Scaling group really starts its instances in LocalStack's EC2. Installed into LocalStack's environment, never into ours.
"""

from localstack.aws.skeleton import Skeleton
from localstack.aws.spec import load_service
from localstack.services.moto import call_moto
from localstack.services.plugins import Service, aws_provider


def _moto(name):
    model = load_service(name)
    table = {operation: lambda context, _request: call_moto(context) for operation in model.operation_names}
    return Service(name=name, skeleton=Skeleton(model, table))


@aws_provider()
def autoscaling():
    return _moto("autoscaling")


@aws_provider()
def ecr():
    return _moto("ecr")


@aws_provider()
def elbv2():
    return _moto("elbv2")

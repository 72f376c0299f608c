"""The public gRPC services: translate, set the deadline, hand over; errors leave as google.rpc.Status.

Runs on the coordinator's loop. Protobuf types end here. A handler never decides, and re-raises cancellation, which
parks a request through the closing of its event iterator.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import NoReturn, TypeVar

import grpc.aio
import structlog

from coordinator.incoming import off_loop, read_generation, read_prompt
from coordinator.jobs.service import JobService
from coordinator.model_facts import ModelFacts, check_model
from coordinator.requests.nouns import Shown
from coordinator.service import Service
from echelon import convert, convert_cluster, convert_jobs
from echelon.errors import EchelonError, InternalError
from echelon.status import abort_status
from echelon.types import Cluster, Completion, ExpertLoad
from echelon.v1 import (
    cluster_pb2,
    cluster_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    jobs_pb2,
    jobs_pb2_grpc,
)

Request = TypeVar("Request")
Response = TypeVar("Response")

log = structlog.get_logger("server")


async def refuse(context: grpc.aio.ServicerContext[Request, Response], error: Exception) -> NoReturn:
    """End the call with the error's status; what is no EchelonError is a defect: logged whole, told as INTERNAL."""
    if not isinstance(error, EchelonError):
        log.error("a handler broke", exc_info=error)
        error = InternalError(f"{type(error).__name__} in the coordinator; its log has the rest")
    await context.abort_with_status(abort_status(error))
    raise AssertionError("abort_with_status always raises")


async def answered(
    context: grpc.aio.ServicerContext[Request, Response], call: Callable[[], Awaitable[Response]]
) -> Response:
    """The call's answer, or the status of its error."""
    try:
        return await call()
    except Exception as error:  # noqa: BLE001 - every error leaves as a status
        await refuse(context, error)


class GenerationServicer(generation_pb2_grpc.GenerationServiceServicer):
    """GenerationService over the coordinator's service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def StreamGenerate(
        self,
        request: generation_pb2.GenerateRequest,
        context: grpc.aio.ServicerContext[generation_pb2.GenerateRequest, generation_pb2.StreamGenerateResponse],
    ) -> AsyncIterator[generation_pb2.StreamGenerateResponse]:
        try:
            async with aclosing(await self._submit(request, context)) as events:
                async for event in events:
                    if isinstance(event, EchelonError):
                        raise event
                    yield convert.stream_to_proto(event)
        except Exception as error:  # noqa: BLE001 - every error leaves as a status
            await refuse(context, error)

    async def Generate(
        self,
        request: generation_pb2.GenerateRequest,
        context: grpc.aio.ServicerContext[generation_pb2.GenerateRequest, generation_pb2.GenerateResponse],
    ) -> generation_pb2.GenerateResponse:
        async def call() -> generation_pb2.GenerateResponse:
            async with aclosing(await self._submit(request, context)) as events:
                async for event in events:
                    if isinstance(event, EchelonError):
                        raise event
                    if isinstance(event, Completion):
                        return convert.completion_to_proto(event)
            raise AssertionError("a stream ends with an outcome")

        return await answered(context, call)

    async def CancelGeneration(
        self,
        request: generation_pb2.CancelGenerationRequest,
        context: grpc.aio.ServicerContext[
            generation_pb2.CancelGenerationRequest, generation_pb2.CancelGenerationResponse
        ],
    ) -> generation_pb2.CancelGenerationResponse:
        async def call() -> generation_pb2.CancelGenerationResponse:
            cancelled = self._service.cancel(request.request_ids)
            return generation_pb2.CancelGenerationResponse(cancelled_request_ids=cancelled)

        return await answered(context, call)

    async def Tokenize(
        self,
        request: generation_pb2.TokenizeRequest,
        context: grpc.aio.ServicerContext[generation_pb2.TokenizeRequest, generation_pb2.TokenizeResponse],
    ) -> generation_pb2.TokenizeResponse:
        async def call() -> generation_pb2.TokenizeResponse:
            check_model(request.model, self._service.facts)
            ids = await self._service.tokenize(await read_prompt(request))
            return generation_pb2.TokenizeResponse(token_ids=ids, max_context=self._service.facts.max_context)

        return await answered(context, call)

    async def Detokenize(
        self,
        request: generation_pb2.DetokenizeRequest,
        context: grpc.aio.ServicerContext[generation_pb2.DetokenizeRequest, generation_pb2.DetokenizeResponse],
    ) -> generation_pb2.DetokenizeResponse:
        async def call() -> generation_pb2.DetokenizeResponse:
            check_model(request.model, self._service.facts)
            text = await self._service.detokenize(await off_loop(request, lambda: tuple(request.token_ids)))
            return generation_pb2.DetokenizeResponse(text=text)

        return await answered(context, call)

    async def _submit(
        self,
        request: generation_pb2.GenerateRequest,
        context: grpc.aio.ServicerContext[generation_pb2.GenerateRequest, Response],
    ) -> AsyncGenerator[Shown]:
        remaining_s = context.time_remaining()
        deadline_unix_s = None if remaining_s is None else self._service.now() + remaining_s
        fields, received = await read_generation(request, deadline_unix_s)
        return self._service.submit(fields, received)


class BatchJobServicer(jobs_pb2_grpc.BatchJobServiceServicer):
    """BatchJobService over the job service."""

    def __init__(self, jobs: JobService, facts: Callable[[], ModelFacts]) -> None:
        self._jobs = jobs
        self._facts = facts

    async def CreateBatchJob(
        self,
        request: jobs_pb2.CreateBatchJobRequest,
        context: grpc.aio.ServicerContext[jobs_pb2.CreateBatchJobRequest, jobs_pb2.BatchJob],
    ) -> jobs_pb2.BatchJob:
        async def call() -> jobs_pb2.BatchJob:
            check_model(request.model, self._facts())
            job = await self._jobs.create(request.batch_job_id, request.model, request.source.jsonl)
            return convert_jobs.job_to_proto(job)

        return await answered(context, call)

    async def GetBatchJob(
        self,
        request: jobs_pb2.GetBatchJobRequest,
        context: grpc.aio.ServicerContext[jobs_pb2.GetBatchJobRequest, jobs_pb2.BatchJob],
    ) -> jobs_pb2.BatchJob:
        async def call() -> jobs_pb2.BatchJob:
            return convert_jobs.job_to_proto(self._jobs.get(convert_jobs.job_id_of(request.name)))

        return await answered(context, call)

    async def ListBatchJobs(
        self,
        request: jobs_pb2.ListBatchJobsRequest,
        context: grpc.aio.ServicerContext[jobs_pb2.ListBatchJobsRequest, jobs_pb2.ListBatchJobsResponse],
    ) -> jobs_pb2.ListBatchJobsResponse:
        async def call() -> jobs_pb2.ListBatchJobsResponse:
            jobs, next_page_token = self._jobs.list_jobs(request.page_size, request.page_token)
            return jobs_pb2.ListBatchJobsResponse(
                batch_jobs=[convert_jobs.job_to_proto(job) for job in jobs], next_page_token=next_page_token
            )

        return await answered(context, call)

    async def CancelBatchJob(
        self,
        request: jobs_pb2.CancelBatchJobRequest,
        context: grpc.aio.ServicerContext[jobs_pb2.CancelBatchJobRequest, jobs_pb2.BatchJob],
    ) -> jobs_pb2.BatchJob:
        async def call() -> jobs_pb2.BatchJob:
            return convert_jobs.job_to_proto(await self._jobs.cancel(convert_jobs.job_id_of(request.name)))

        return await answered(context, call)

    async def WatchBatchJob(
        self,
        request: jobs_pb2.WatchBatchJobRequest,
        context: grpc.aio.ServicerContext[jobs_pb2.WatchBatchJobRequest, jobs_pb2.WatchBatchJobResponse],
    ) -> AsyncIterator[jobs_pb2.WatchBatchJobResponse]:
        try:
            async with aclosing(self._jobs.watch(convert_jobs.job_id_of(request.name))) as changes:
                async for job in changes:
                    yield jobs_pb2.WatchBatchJobResponse(batch_job=convert_jobs.job_to_proto(job))
        except Exception as error:  # noqa: BLE001 - every error leaves as a status
            await refuse(context, error)

    async def StreamBatchJobResults(
        self,
        request: jobs_pb2.StreamBatchJobResultsRequest,
        context: grpc.aio.ServicerContext[
            jobs_pb2.StreamBatchJobResultsRequest, jobs_pb2.StreamBatchJobResultsResponse
        ],
    ) -> AsyncIterator[jobs_pb2.StreamBatchJobResultsResponse]:
        try:
            job_id = convert_jobs.job_id_of(request.name)
            async with aclosing(self._jobs.results(job_id, request.after_cursor, request.follow)) as results:
                async for result in results:
                    yield jobs_pb2.StreamBatchJobResultsResponse(result=convert_jobs.item_to_proto(result))
        except Exception as error:  # noqa: BLE001 - every error leaves as a status
            await refuse(context, error)


class ClusterServicer(cluster_pb2_grpc.ClusterServiceServicer, cluster_pb2_grpc.ModelServiceServicer):
    """ClusterService and ModelService: what serves, and what has happened."""

    def __init__(
        self, describe: Callable[[], Cluster], describe_experts: Callable[[], list[ExpertLoad]], service: Service
    ) -> None:
        self._describe = describe
        self._describe_experts = describe_experts
        self._service = service

    async def GetCluster(
        self,
        request: cluster_pb2.GetClusterRequest,
        context: grpc.aio.ServicerContext[cluster_pb2.GetClusterRequest, cluster_pb2.Cluster],
    ) -> cluster_pb2.Cluster:
        return convert_cluster.cluster_to_proto(self._describe())

    async def GetExpertLoad(
        self,
        request: cluster_pb2.GetExpertLoadRequest,
        context: grpc.aio.ServicerContext[cluster_pb2.GetExpertLoadRequest, cluster_pb2.GetExpertLoadResponse],
    ) -> cluster_pb2.GetExpertLoadResponse:
        layers = [convert_cluster.expert_load_to_proto(load) for load in self._describe_experts()]
        return cluster_pb2.GetExpertLoadResponse(layers=layers)

    async def ListModels(
        self,
        request: cluster_pb2.ListModelsRequest,
        context: grpc.aio.ServicerContext[cluster_pb2.ListModelsRequest, cluster_pb2.ListModelsResponse],
    ) -> cluster_pb2.ListModelsResponse:
        models = [convert_cluster.model_to_proto(model) for model in self._describe().models]
        return cluster_pb2.ListModelsResponse(models=models)

    async def WatchClusterEvents(
        self,
        request: cluster_pb2.WatchClusterEventsRequest,
        context: grpc.aio.ServicerContext[
            cluster_pb2.WatchClusterEventsRequest, cluster_pb2.WatchClusterEventsResponse
        ],
    ) -> AsyncIterator[cluster_pb2.WatchClusterEventsResponse]:
        async with aclosing(self._service.events.watch(request.after_sequence, request.follow)) as events:
            async for event in events:
                yield convert_cluster.event_to_proto(event)
